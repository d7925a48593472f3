"""The encoder: a convolutional stack for each image and a dense stack for each vector, joined in the order of names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shared.model.layers import glorot, mlp

if TYPE_CHECKING:
    from shared.config import NetworkSettings
    from shared.stream import ObsSpec, StreamSpec

IMAGE_SIZE = 64
VECTOR_LAYERS = 3


def check_entry(name: str, entry: ObsSpec) -> None:
    """Check that there is an encoder for entries of this shape. Raises: ValueError if there is none."""
    if entry.is_image and (entry.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE) or entry.shape[2:] not in ((1,), (3,))):
        raise ValueError(
            f"observation {name!r} is an image of shape {entry.shape}; expected (64, 64, 1) or (64, 64, 3); "
            "render it at 64x64, in grey or RGB"
        )
    if not entry.is_image and len(entry.shape) != 1:
        raise ValueError(
            f"observation {name!r} has shape {entry.shape}; expected a vector of shape (size,); "
            "flatten it in the simulator"
        )


def centred(image: Tensor) -> Tensor:
    """Return bytes as floats in [-0.5, 0.5]. Shapes: (..., 64, 64, C) uint8 to the same in float32."""
    return image.float() / 255 - 0.5


class ImageEncoder(nn.Module):
    """Maps 64x64 images to 32 * channels features: four convolutions with stride 2, without padding, each with a ReLU.

    Source: arXiv 1912.01603, appendix A, which has 32 channels and so 1024 features.
    """

    def __init__(self, num_colours: int, channels: int) -> None:
        super().__init__()
        sizes = [num_colours, channels, 2 * channels, 4 * channels, 8 * channels]
        layers: list[nn.Module] = []
        for num_in, num_out in zip(sizes[:-1], sizes[1:], strict=True):
            conv = nn.Conv2d(num_in, num_out, kernel_size=4, stride=2)
            glorot(conv)
            layers += [conv, nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.embed_dim = 32 * channels

    def forward(self, image: Tensor) -> Tensor:
        """Return the embeddings. Shapes: (..., 64, 64, C) uint8 to (..., embed_dim)."""
        lead = image.shape[:-3]
        pixels = centred(image).reshape(-1, *image.shape[-3:]).permute(0, 3, 1, 2)  # channels last in memory, no copy
        return self.layers(pixels).view(*lead, self.embed_dim)


class VectorEncoder(nn.Module):
    """Maps a normalised vector to the last activation of a dense stack: (..., size) to (..., hidden_dim)."""

    def __init__(self, size: int, hidden_dim: int, activation: str) -> None:
        super().__init__()
        self.layers = mlp(size, hidden_dim, VECTOR_LAYERS, activation)
        self.embed_dim = hidden_dim

    def forward(self, vector: Tensor) -> Tensor:
        """Return the embeddings."""
        return self.layers(vector)


class Encoder(nn.Module):
    """One encoder for each observation entry. The embeddings are joined in the order of sorted names."""

    def __init__(self, spec: StreamSpec, networks: NetworkSettings) -> None:
        """Create the encoders. Raises: ValueError if an entry is neither a 64x64 image nor a vector."""
        super().__init__()
        entries: dict[str, ImageEncoder | VectorEncoder] = {}
        for name, entry in sorted(spec.obs.items()):
            check_entry(name, entry)
            if entry.is_image:
                entries[name] = ImageEncoder(entry.shape[2], networks.encoder_channels)
            else:
                entries[name] = VectorEncoder(entry.shape[0], networks.hidden_dim, networks.activation)
        self.entries = nn.ModuleDict(entries)
        self.embed_dim = sum(encoder.embed_dim for encoder in entries.values())

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        """Return the joined embedding (..., embed_dim). Shapes: entries (..., *shape), vectors normalised."""
        return torch.cat([encoder(obs[name]) for name, encoder in self.entries.items()], -1)
