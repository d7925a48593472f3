"""The layers that all networks are made of: dense stacks, a GRU cell, and the running normaliser."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from shared.stream import StreamSpec

ACTIVATIONS: dict[str, type[nn.Module]] = {"elu": nn.ELU, "relu": nn.ReLU, "silu": nn.SiLU}
Linear = Callable[[nn.Linear, Tensor], Tensor]  # applies a layer; a scan of the learner replaces `plain` by its own
NORMALISED_LIMIT = 10.0  # standard deviations; values further from the mean are clipped
MIN_OBS_STD = 1e-3  # the rounding noise of a dimension that never changes must not be amplified
# In the statistics of N rows, a number further from the mean than sqrt(N) standard deviations, but at least and at most
# these, counts as this far. So one absurd number at most doubles the variance of 100 rows or more. A signal that grows
# is followed: numbers that lie this far out multiply the variance with every chunk.
OUTLIER_STDS = (10.0, 100.0)
LARGEST = 1e15  # squares of numbers up to this are finite in float32, also the sum of a thousand million of them
EARLY_ROWS = 10_000  # until so many rows are known, a new chunk is also compared with its own median
EARLY_SAMPLE = 2048  # rows of a chunk that are sorted for it


def plain(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear layer. Cells use this unless a scan gives them another function."""
    return layer(x)


def glorot(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Set Glorot-uniform weights and zero bias, as in the TensorFlow 2 code of arXiv 1912.01603, in place."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def dense(num_in: int, num_out: int) -> nn.Linear:
    """Return a linear layer with the initialisation of `glorot`."""
    layer = nn.Linear(num_in, num_out)
    glorot(layer)
    return layer


def symlog(x: Tensor) -> Tensor:
    """Return sign(x) ln(1 + |x|): close to x near zero, logarithmic far from it. Source: arXiv 2301.04104, eq. 9."""
    return x.sign() * x.abs().log1p()


def mlp(num_in: int, num_hidden: int, num_layers: int, activation: str, num_out: int | None = None) -> nn.Sequential:
    """Return `num_layers` dense layers with activations, and after them a linear layer unless `num_out` is None.

    Shapes: (..., num_in) to (..., num_out or num_hidden).
    """
    layers: list[nn.Module] = []
    for index in range(num_layers):
        layers += [dense(num_in if index == 0 else num_hidden, num_hidden), ACTIVATIONS[activation]()]
    if num_out is not None:
        layers.append(dense(num_hidden, num_out))
    return nn.Sequential(*layers)


class GRU(nn.Module):
    """A GRU cell made of two linear layers. Its gates and its state are float32 also under autocast, on every device.

    `nn.GRUCell` computes the same, but under autocast it uses bfloat16 on CUDA and float32 on the CPU.
    Source: Keras GRUCell with reset_after=True, which is `nn.GRUCell` (gate order: reset, update, candidate).
    """

    def __init__(self, num_in: int, num_units: int) -> None:
        super().__init__()
        self.num_units = num_units
        self.input = dense(num_in, 3 * num_units)
        self.recurrent = dense(num_units, 3 * num_units)
        nn.init.orthogonal_(self.recurrent.weight)

    def forward(self, x: Tensor, state: Tensor, linear: Linear = plain) -> Tensor:
        """Return the next state. Shapes: x (N, num_in), state (N, num_units) float32."""
        sizes = [2 * self.num_units, self.num_units]
        gates_x, candidate_x = linear(self.input, x).float().split(sizes, -1)
        gates_h, candidate_h = linear(self.recurrent, state).float().split(sizes, -1)
        reset, update = torch.sigmoid(gates_x + gates_h).chunk(2, -1)
        candidate = torch.tanh(candidate_x + reset * candidate_h)
        return torch.lerp(candidate, state, update)


class RunningNorm(nn.Module):
    """Normalises by the mean and variance of each dimension over all rows so far. Without rows, it changes nothing."""

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, size: int, *, clip: bool = True) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.zeros(()))
        self._early_rows = 0  # rows that this process has added

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised vectors. Shapes: (..., size) to the same.

        Units: standard deviations from the mean, within +-10 if `clip`.
        """
        normalised = (x - self.mean) * self.var.clamp_min(MIN_OBS_STD**2).rsqrt()
        return normalised.clamp(-NORMALISED_LIMIT, NORMALISED_LIMIT) if self.clip else normalised

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Add rows (..., size) to the statistics, in place and without a host synchronisation.

        Numbers outside of `plausible` count as its limits. A dimension whose new statistics would not be finite keeps
        the old ones.
        Source: Chan, Golub and LeVeque, 1979: how to merge counts, means and squared deviations of two sets.
        """
        rows = rows.reshape(-1, rows.shape[-1])
        total = self.count + rows.shape[0]
        low, high = self.plausible(rows, stds=total.sqrt().clamp(*OUTLIER_STDS))
        self._early_rows += rows.shape[0]
        var, mean = torch.var_mean(rows.clamp(low, high), 0, correction=0)
        share = rows.shape[0] / total
        delta = mean - self.mean
        var = self.var + share * (var - self.var) + delta.square() * share * (1 - share)
        mean = self.mean + delta * share
        finite = mean.isfinite() & var.isfinite()
        self.var.copy_(torch.where(finite, var, self.var))
        self.mean.copy_(torch.where(finite, mean, self.mean))
        self.count.copy_(total)

    def plausible(self, rows: Tensor, *, stds: Tensor | float, least: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest number of each dimension that new rows should have, (size,) each.

        They are `stds` standard deviations from the mean, and at least `least`. While few rows are known, the limits
        also include what lies near the median of the new rows, so that the first chunk needs no rows before it.
        Shapes: rows (N, size). Does not synchronise.
        """
        reach = (stds * self.var.sqrt().clamp_min(MIN_OBS_STD)).clamp_min(least)
        low, high = self.mean - reach, self.mean + reach
        if self._early_rows >= EARLY_ROWS:
            return low, high
        # Only the device knows whether older rows were restored from a checkpoint.
        known, early = self.count > 0, self.count < EARLY_ROWS
        centre, near = _middle(rows)
        # 99 % of Gaussian numbers lie within 2.6 standard deviations.
        near = (stds * (near / 2).clamp_min(MIN_OBS_STD)).clamp_min(least)
        early_low = torch.where(known, torch.minimum(low, centre - near), centre - near)
        early_high = torch.where(known, torch.maximum(high, centre + near), centre + near)
        return torch.where(early, early_low, low), torch.where(early, early_high, high)


def _middle(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return each dimension's median and the distance from it within which 99 % of the rows lie, (size,) each.

    At least one of three or more rows lies outside, so that one absurd number does not decide.
    Shapes: rows (N, size).
    """
    sample = rows[:: -(-rows.shape[0] // EARLY_SAMPLE)]
    count = sample.shape[0]
    inside = min(math.ceil(0.99 * count), count - 1) if count > 2 else count
    centre = sample.sort(0).values[(count - 1) // 2]
    return centre, (sample - centre).abs().sort(0).values[inside - 1]


class Normaliser(nn.Module):
    """Brings vector entries to the scale of learning: by running statistics, by symlog, by both or not at all.

    Images stay as they are. Vectors are within +-10 after running statistics alone, and else within +-LARGEST before
    symlog, so that no finite observation makes a network overflow.
    """

    def __init__(self, spec: StreamSpec, *, enabled: bool, symlogged: bool = False) -> None:
        super().__init__()
        vectors = sorted(name for name, entry in spec.obs.items() if not entry.is_image)
        self.symlogged = frozenset(vectors if symlogged else ())
        self._unlimited = frozenset(vectors if symlogged or not enabled else ())
        norms = {name: RunningNorm(spec.obs[name].shape[0], clip=not symlogged) for name in vectors if enabled}
        self.entries = nn.ModuleDict(norms)

    def forward(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the entries with scaled vectors. They are the encoder's input and the decoder's target."""
        scaled = {name: self.entries[name](x) if name in self.entries else x for name, x in obs.items()}
        scaled = {name: x.clamp(-LARGEST, LARGEST) if name in self._unlimited else x for name, x in scaled.items()}
        return {name: symlog(x) if name in self.symlogged else x for name, x in scaled.items()}

    def update(self, obs: dict[str, Tensor]) -> None:
        """Add new rows (..., *shape) to the statistics. Every row should come once."""
        for name, norm in self.entries.items():
            assert isinstance(norm, RunningNorm)
            norm.update(obs[name])
