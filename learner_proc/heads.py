"""The heads: the model predicts observations, reward and continuation from a feature, and the critic a value."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shared.model.distributions import unit_gaussian_nll
from shared.model.encoder import VECTOR_LAYERS, centred
from shared.model.layers import dense, glorot, mlp

if TYPE_CHECKING:
    from shared.config import NetworkSettings
    from shared.stream import StreamSpec

REWARD_LAYERS = 2
CONT_LAYERS = 3
CRITIC_LAYERS = 3


def scalar_output(layer: nn.Linear, x: Tensor) -> Tensor:
    """Return the number that a head's last layer makes of `x`, in float32 for any dtype of `x`: (..., hidden) to (...).

    Near 150, bfloat16 has only whole numbers. The returns of two actions would then be equal, and a small update would
    not change the bias.
    """
    if x.dtype == torch.float32:
        return layer(x).squeeze(-1)
    return (x.float() * layer.weight[0]).sum(-1) + layer.bias  # compiled: one pass over x, without a float32 copy of it


class ScalarHead(nn.Module):
    """A stack of dense layers that ends in one float32 number per feature: (..., F) to (...)."""

    def __init__(self, feat_dim: int, num_layers: int, networks: NetworkSettings) -> None:
        super().__init__()
        self.layers = mlp(feat_dim, networks.hidden_dim, num_layers, networks.activation, 1)

    def forward(self, feat: Tensor) -> Tensor:
        """Return one number per feature."""
        *hidden, last = self.layers
        x = feat
        for layer in hidden:
            x = layer(x)
        assert isinstance(last, nn.Linear)
        return scalar_output(last, x)


class ImageDecoder(nn.Module):
    """Maps features to the mean of a unit Gaussian over centred pixels.

    It is a dense layer without activation, followed by four transposed convolutions.
    Source: arXiv 1912.01603, appendix A.
    """

    def __init__(self, feat_dim: int, num_colours: int, channels: int) -> None:
        super().__init__()
        self.input = dense(feat_dim, 32 * channels)
        sizes = [32 * channels, 4 * channels, 2 * channels, channels, num_colours]
        layers: list[nn.Module] = []
        for num_in, num_out, kernel in zip(sizes[:-1], sizes[1:], (5, 5, 6, 6), strict=True):
            conv = nn.ConvTranspose2d(num_in, num_out, kernel, stride=2)
            glorot(conv)
            layers += [conv, nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, feat: Tensor) -> Tensor:
        """Return the mean of each pixel. Shapes: (..., F) to (..., 64, 64, C) float32."""
        image = self.layers(self.input(feat).reshape(-1, self.input.out_features, 1, 1))
        return image.permute(0, 2, 3, 1).float().view(*feat.shape[:-1], *image.shape[2:], image.shape[1])


class VectorDecoder(nn.Module):
    """Maps features to the mean of a unit Gaussian over a normalised vector: (..., F) to (..., size) float32."""

    def __init__(self, feat_dim: int, size: int, networks: NetworkSettings) -> None:
        super().__init__()
        self.layers = mlp(feat_dim, networks.hidden_dim, VECTOR_LAYERS, networks.activation, size)

    def forward(self, feat: Tensor) -> Tensor:
        """Return the mean of the vector. Shapes: (..., F) to (..., size) float32."""
        return self.layers(feat).float()


class Decoder(nn.Module):
    """One decoder per observation entry."""

    def __init__(self, feat_dim: int, spec: StreamSpec, networks: NetworkSettings) -> None:
        super().__init__()
        entries: dict[str, nn.Module] = {}
        for name, entry in sorted(spec.obs.items()):
            if entry.is_image:
                entries[name] = ImageDecoder(feat_dim, entry.shape[2], networks.encoder_channels)
            else:
                entries[name] = VectorDecoder(feat_dim, entry.shape[0], networks)
        self.entries = nn.ModuleDict(entries)

    def forward(self, feat: Tensor) -> dict[str, Tensor]:
        """Return the mean of every entry on the scale of `target`.

        Shapes: (..., F) to entries (..., *shape) float32.
        """
        return {name: decoder(feat) for name, decoder in self.entries.items()}

    def nll(self, feat: Tensor, obs: dict[str, Tensor]) -> Tensor:
        """Return -log p(obs | feat), summed over dimensions and entries.

        Shapes: feat (..., F), obs entries (..., *shape), images in uint8 and vectors normalised; result (...).
        Units: nats.
        """
        losses = []
        for name, mean in self(feat).items():
            losses.append(unit_gaussian_nll(target(obs[name]), mean, event_dims=mean.dim() - feat.dim() + 1))
        return torch.stack(losses).sum(0)


def target(entry: Tensor) -> Tensor:
    """Return what a decoder has to predict: images (uint8) centred in [-0.5, 0.5], normalised vectors as they are."""
    return centred(entry) if entry.dtype == torch.uint8 else entry
