"""The layers every network is built from: dense stacks, the GRU written out, the running normaliser."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from shared.stream import StreamSpec

ACTIVATIONS: dict[str, type[nn.Module]] = {"elu": nn.ELU, "relu": nn.ReLU, "silu": nn.SiLU}
Linear = Callable[[nn.Linear, Tensor], Tensor]  # how a linear layer is applied; scans bring their own
NORMALISED_LIMIT = 10.0  # standard deviations; what lies further out is clipped
MIN_OBS_STD = 1e-3  # a dimension that never moves must not be blown up by its rounding noise


def plain(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer applied as it is: what every cell does unless a scan asks for something else."""
    return layer(x)


def glorot(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Glorot-uniform weight and zero bias, in place."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def dense(num_in: int, num_out: int) -> nn.Linear:
    """A linear layer, initialised the way the original agent initialises its own."""
    layer = nn.Linear(num_in, num_out)
    glorot(layer)
    return layer


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|): the identity near zero, logarithmic far out. Source: arXiv 2301.04104, eq. 9."""
    return x.sign() * x.abs().log1p()


def mlp(num_in: int, num_hidden: int, num_layers: int, activation: str, num_out: int | None = None) -> nn.Sequential:
    """`num_layers` activated dense layers, then a linear one to `num_out`; None ends on the last activation.

    Shapes: (..., num_in) to (..., num_out or num_hidden).
    """
    layers: list[nn.Module] = []
    for index in range(num_layers):
        layers += [dense(num_in if index == 0 else num_hidden, num_hidden), ACTIVATIONS[activation]()]
    if num_out is not None:
        layers.append(dense(num_hidden, num_out))
    return nn.Sequential(*layers)


class GRU(nn.Module):
    """A GRU cell as two linear layers; gates and state stay float32 under autocast on every device.

    `nn.GRUCell` has the same mathematics but turns bfloat16 under CUDA autocast and does not under the CPU's.
    Source: Keras GRUCell with reset_after=True, which is `nn.GRUCell` (gate order: reset, update, candidate).
    """

    def __init__(self, num_in: int, num_units: int) -> None:
        super().__init__()
        self.num_units = num_units
        self.input = dense(num_in, 3 * num_units)
        self.recurrent = dense(num_units, 3 * num_units)
        nn.init.orthogonal_(self.recurrent.weight)

    def forward(self, x: Tensor, state: Tensor, linear: Linear = plain) -> Tensor:
        """Shapes: x (N, num_in), state (N, num_units) float32; result like state."""
        sizes = [2 * self.num_units, self.num_units]
        gates_x, candidate_x = linear(self.input, x).float().split(sizes, -1)
        gates_h, candidate_h = linear(self.recurrent, state).float().split(sizes, -1)
        reset, update = torch.sigmoid(gates_x + gates_h).chunk(2, -1)
        candidate = torch.tanh(candidate_x + reset * candidate_h)
        return torch.lerp(candidate, state, update)


class RunningNorm(nn.Module):
    """Mean and variance of every dimension over all rows seen; the identity until the first update."""

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, size: int, *, clip: bool = True) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Units: standard deviations from the mean, within +-10 if `clip`. Shapes: (..., size) to the same."""
        normalised = (x - self.mean) * self.var.clamp_min(MIN_OBS_STD**2).rsqrt()
        return normalised.clamp(-NORMALISED_LIMIT, NORMALISED_LIMIT) if self.clip else normalised

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Merge the statistics of rows (..., size), in place and without a host synchronisation.

        Source: Chan, Golub, LeVeque 1979, pairwise merge of counts, means and squared deviations.
        """
        rows = rows.reshape(-1, rows.shape[-1])
        var, mean = torch.var_mean(rows, 0, correction=0)
        total = self.count + rows.shape[0]
        share = rows.shape[0] / total
        delta = mean - self.mean
        self.var.copy_(self.var + share * (var - self.var) + delta.square() * share * (1 - share))
        self.mean.add_(delta * share)
        self.count.copy_(total)


class Normaliser(nn.Module):
    """Every vector entry normalised by its running statistics, symlogged, both or neither; images pass untouched."""

    def __init__(self, spec: StreamSpec, *, enabled: bool, symlogged: bool = False) -> None:
        super().__init__()
        vectors = sorted(name for name, entry in spec.obs.items() if not entry.is_image)
        self.symlogged = frozenset(vectors if symlogged else ())
        norms = {name: RunningNorm(spec.obs[name].shape[0], clip=not symlogged) for name in vectors if enabled}
        self.entries = nn.ModuleDict(norms)

    def forward(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same entries with vectors on the scale of learning; encoder input and decoder target alike."""
        scaled = {name: self.entries[name](x) if name in self.entries else x for name, x in obs.items()}
        return {name: symlog(x) if name in self.symlogged else x for name, x in scaled.items()}

    def update(self, obs: dict[str, Tensor]) -> None:
        """Take new rows (..., *shape) into the statistics; each row should be seen once."""
        for name, norm in self.entries.items():
            assert isinstance(norm, RunningNorm)
            norm.update(obs[name])
