"""Checks every chunk when it is committed, before a row of it can be sampled: numbers that are not finite or absurd.

    what arrives                                what the replay and the statistics get
    NaN or infinity in a row                    the row becomes zeros with is_first and is_last: an episode of one row
    a number absurdly far from its entry's      the nearest limit
    other numbers
    everything else                             itself, bit for bit

A number is absurd if it lies more than `max_deviation` standard deviations from the mean of its dimension, and also
further than DISTANCE, which depends on no statistics. So a rare flag that is 1 or a rare reward of 1000 stays as it is.
The statistics follow a signal that grows, and the limits grow with it: see `shared.model.layers.RunningNorm`. They are
apart from the networks' own, because every row has to pass, whether observations are normalised or not, and because
they must lie in the memory in which the replay lies.

VecNormalize (stable-baselines3) clips at +-10 after normalisation, as our networks do; the normalisers of rsl_rl and
brax clip nothing by default. All three let every number into their statistics, so one absurd number blinds a dimension
for the rest of a run.

Nothing here waits for the device, except `names`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learner_proc.numbers import Numbers
from shared import metrics
from shared.model.layers import LARGEST, RunningNorm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tensordict import TensorDict

    from shared.stream import Layout

DISTANCE = 1000.0
SATURATED = 0.99  # an action in [-1, 1] beyond this is at its limit
LEARNED_ROWS = 100_000  # environment rows of a restored replay from which the statistics begin
REWARD = ("reward",)


class RowBounds:
    """Bounds the rows of committed chunks in place, and counts what it changed."""

    metrics = (
        metrics.CLIPPED_VALUES,
        metrics.MASKED_ROWS,
        metrics.TERMINAL_ROWS,
        metrics.REWARD_MAX,
        metrics.SATURATED_ACTIONS,
    )

    def __init__(self, layout: Layout, device: torch.device, *, max_deviation: float | None) -> None:
        """device: where the replay lies. max_deviation: in standard deviations; None bounds by LARGEST alone."""
        self._stds, self._num_envs = max_deviation, layout.num_envs
        vectors = {field.key: field.shape[0] for field in layout.fields if _is_vector(field.key, field.dtype)}
        sizes = vectors | {REWARD: 1}
        self._norms = {key: RunningNorm(size).to(device) for key, size in sizes.items()}
        # For each dimension: how many numbers were clipped, and the largest of them without its sign.
        self._clipped = {key: torch.zeros(size, dtype=torch.float64, device=device) for key, size in sizes.items()}
        self._largest = {key: torch.zeros(size, device=device) for key, size in sizes.items()}
        # masked rows, terminal rows, actions at their limit, actions
        self._counts = torch.zeros(4, dtype=torch.float64, device=device)
        self._reward_max = torch.zeros((), device=device)
        self._split = torch.zeros(layout.num_envs, dtype=torch.bool, device=device)  # whether the last row was masked

    @torch.no_grad()
    def apply(self, rows: TensorDict) -> None:
        """Bound the rows of the next chunk, in place. Chunks must come in their order, each once.

        Shapes: rows [K] with fields (K, E, ...).
        """
        self._mask(rows)
        for key, norm in self._norms.items():
            entry = rows.get(key)
            flat = entry.view(-1, norm.mean.shape[0])
            low, high = self._limits(norm, flat)
            outside = (flat < low) | (flat > high)
            self._clipped[key] += outside.sum(0)
            beyond = torch.where(outside, flat.abs(), 0.0).amax(0)
            torch.maximum(self._largest[key], beyond, out=self._largest[key])
            flat.clamp_(low, high)
            norm.update(flat)
        self._count(rows)

    @torch.no_grad()
    def learn(self, rows: TensorDict) -> None:
        """Begin the statistics with the newest of these rows, which have passed `apply` in an earlier process.

        Shapes: rows [n], oldest first.
        """
        num_newest = max(1, LEARNED_ROWS // self._num_envs)
        for key, norm in self._norms.items():
            norm.update(rows.get(key)[-num_newest:].reshape(-1, norm.mean.shape[0]))

    def tensors(self) -> dict[str, Tensor]:
        """Return every statistic and count by name, for a checkpoint. They are the live tensors."""
        named = {"counts": self._counts, "reward_max": self._reward_max, "split": self._split}
        for key, norm in self._norms.items():
            own = dict(norm.named_buffers()) | {"clipped": self._clipped[key], "largest": self._largest[key]}
            named |= {f"{'.'.join(key)}.{name}": tensor for name, tensor in own.items()}
        return named

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Continue with what `tensors` returned in an earlier process. What has another name or shape is left out."""
        for name, tensor in self.tensors().items():
            if name in saved and saved[name].shape == tensor.shape:
                tensor.copy_(saved[name])

    def numbers(self) -> Numbers:
        """Return the counts since the run began; the share of saturated actions is that since the last call.

        Does not synchronise.
        """
        clipped = torch.stack([count.sum() for count in self._clipped.values()]).sum()
        masked, terminal, saturated, actions = self._counts.unbind()
        share = saturated / actions
        found = Numbers.of(dict(zip(self.metrics, (clipped, masked, terminal, self._reward_max, share), strict=True)))
        self._counts[2:].zero_()
        return found

    def names(self) -> list[tuple[str, int, float]]:
        """Return every dimension with clipped numbers, such as "policy[3]", their count, and the largest. Waits."""
        found = []
        for key, counts in self._clipped.items():
            largest = self._largest[key].tolist()
            for index, count in enumerate(counts.tolist()):
                if count:
                    name = key[-1] if key == REWARD else f"{key[-1]}[{index}]"
                    found.append((name, int(count), largest[index]))
        return sorted(found, key=lambda dimension: -dimension[2])

    def _limits(self, norm: RunningNorm, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest number that stays, (size,) each. Shapes: flat (K * E, size)."""
        if self._stds is None:
            limit = torch.full_like(norm.mean, LARGEST)
            return -limit, limit
        low, high = norm.plausible(flat, stds=self._stds, least=DISTANCE)
        return low.clamp(-LARGEST, LARGEST), high.clamp(-LARGEST, LARGEST)

    def _mask(self, rows: TensorDict) -> None:
        """Replace every row with a number that is not finite, as the simulators do with states that diverged.

        The row after it begins an episode, so no loss reaches across.
        """
        vectors = [rows.get(key) for key in self._norms if key != REWARD]
        floats = [*vectors, rows.get("action"), rows.get("reward")[..., None]]
        bad = ~torch.stack([entry.isfinite().all(-1) for entry in floats]).all(0)  # (K, E)
        after = torch.cat([self._split[None], bad[:-1]])
        self._split.copy_(bad[-1])
        for entry in vectors:
            entry.masked_fill_(bad[..., None], 0.0)
        begins = bad | after
        rows.get("action").masked_fill_(begins[..., None], 0.0)
        rows.get("reward").masked_fill_(bad, 0.0)
        rows.get("is_first").logical_or_(begins)
        rows.get("is_last").logical_or_(bad)
        rows.get("is_terminal").logical_and_(~bad)
        self._counts[0] += bad.sum()

    def _count(self, rows: TensorDict) -> None:
        """Count ends of the task, saturated actions and the largest reward. Random actions are not counted."""
        chosen = (rows.get("policy_version") > 0)[:, None, None]
        action = rows.get("action").abs()
        self._counts[1] += rows.get("is_terminal").sum()
        self._counts[2] += ((action > SATURATED) & chosen).sum()
        self._counts[3] += chosen.expand_as(action).sum()
        reward_max = rows.get("reward").abs().amax()
        torch.maximum(self._reward_max, reward_max, out=self._reward_max)


def _is_vector(key: tuple[str, ...], dtype: str) -> bool:
    """Return whether a field is an observation of numbers, not an image."""
    return key[0] == "obs" and dtype == "float32"
