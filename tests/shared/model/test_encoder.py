"""Encoders of images and vectors, and how their embeddings are joined."""

import pytest
import torch
import torch.nn.functional as F

from shared.config import NetworkSettings
from shared.model.encoder import Encoder, ImageEncoder, centred
from shared.stream import ObsSpec, StreamSpec


def test_bytes_are_centred_between_minus_half_and_half():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(centred(image), torch.tensor([-0.5, -0.3, 0.5]), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("num_colours", [1, 3])
def test_the_image_encoder_is_four_valid_convolutions_flattened_by_channel(num_colours):
    torch.manual_seed(0)
    encoder = ImageEncoder(num_colours, 2)
    image = torch.randint(0, 256, (3, 5, 64, 64, num_colours), dtype=torch.uint8)
    x = (image.flatten(0, 1).float() / 255 - 0.5).permute(0, 3, 1, 2).contiguous()
    for index, size in zip((0, 2, 4, 6), (31, 14, 6, 2), strict=True):
        conv = encoder.layers[index]
        assert isinstance(conv, torch.nn.Conv2d)
        x = F.relu(F.conv2d(x, conv.weight, conv.bias, stride=2))
        assert x.shape[2:] == (size, size)
    torch.testing.assert_close(encoder(image), x.reshape(3, 5, 64), rtol=1e-4, atol=1e-5)


def test_embeddings_are_joined_in_sorted_name_order():
    spec = StreamSpec(1, {"b": ObsSpec((3,), "float32"), "a": ObsSpec((64, 64, 1), "uint8")}, 1)
    encoder = Encoder(spec, NetworkSettings(hidden_dim=5, encoder_channels=2))
    obs = {"b": torch.randn(4, 3), "a": torch.randint(0, 256, (4, 64, 64, 1), dtype=torch.uint8)}
    embed = encoder(obs)
    assert embed.shape == (4, encoder.embed_dim) == (4, 64 + 5)
    assert torch.equal(embed[:, :64], encoder.entries["a"](obs["a"]))
    assert torch.equal(embed[:, 64:], encoder.entries["b"](obs["b"]))


@pytest.mark.parametrize(
    "entry", [ObsSpec((32, 32, 3), "uint8"), ObsSpec((64, 64, 4), "uint8"), ObsSpec((3, 3), "float32")]
)
def test_an_entry_without_an_encoder_is_refused_with_its_shape_and_the_fix(entry):
    with pytest.raises(ValueError, match=r"'camera'.*\(\d.*; expected .*; (render|flatten)"):
        Encoder(StreamSpec(1, {"camera": entry}, 1), NetworkSettings())
