"""How well the model predicts: the prior is rolled along recorded actions and compared with the recorded observations.

The reconstruction error does not show this, because the posterior has seen the observation that it reconstructs. Here
the posterior sees `context` rows and the prior predicts the rest. Example with L = 16, context 5 and horizon 5:

    row        0 1 2 3 4 | 5 6 7 8 9 | 10 ...
               observed  | predicted |           the error at horizon 5 is that of row 9; the last observation is row 4

Every distribution is replaced by its mean. No random number is drawn, so the diagnostics do not change the training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from learner_proc.heads import target
from learner_proc.numbers import Numbers
from shared.metrics import OPEN_LOOP, REPEAT_LAST, Metric
from shared.model.rssm import Belief, feat

if TYPE_CHECKING:
    from tensordict import TensorDict

    from learner_proc.world_model import WorldModel
    from shared.model.layers import Normaliser
    from shared.stream import StreamSpec

MAX_CONTEXT = 5
HORIZONS = (5, 15, 50)
WINDOW_LENGTH = MAX_CONTEXT + max(HORIZONS)  # rows of a window in which every horizon fits


class OpenLoop(NamedTuple):
    """Predictions and observations of n windows, to be plotted side by side.

    context: the number of rows that the model has seen. crosses (n,) bool: whether an episode begins after row 0.
    Shapes: entries (n, L, *shape).
    Units: vectors are normalised, images are in [-0.5, 0.5].
    """

    context: int
    predicted: dict[str, Tensor]
    observed: dict[str, Tensor]
    crosses: Tensor


class Diagnostics:
    """Open-loop prediction errors of a world model on sampled windows of `length` rows, for rows of metrics.jsonl.

    If `open_loop_x_15` is below `repeat_last_x_15`, the model predicts 15 steps ahead better than a repetition of the
    last observation. For far horizons this alone is weak evidence: the repetition has an error of up to twice the
    variance, and the constant mean has an error of once the variance.
    """

    def __init__(self, spec: StreamSpec, world_model: WorldModel, normaliser: Normaliser, *, length: int) -> None:
        """Choose the horizons that fit in `length` rows. All fit in `WINDOW_LENGTH` rows."""
        self._world_model, self._normaliser = world_model, normaliser
        self._obs_names, self._length = sorted(spec.obs), length
        self.context = max(1, min(MAX_CONTEXT, length // 3))
        self.horizons = tuple(h for h in HORIZONS if self.context + h <= length)
        families = (OPEN_LOOP, REPEAT_LAST)
        self.metrics = tuple(f.member(name, h) for name in self._obs_names for f in families for h in self.horizons)

    @torch.no_grad()
    def __call__(self, batch: TensorDict) -> Numbers:
        """Return the mean squared error per dimension or pixel for each of `metrics`. Does not synchronise.

        A window counts only if no episode begins between its first row and the predicted row. If no window counts, the
        error is NaN.
        Shapes: batch [B, L] in the arrival layout of `shared.stream`.
        """
        if not self.horizons:
            return Numbers((), torch.zeros(0, device=batch["reward"].device))
        rows = [self.context - 1 + h for h in self.horizons]
        obs = self._observations(batch)
        features = feat(self._roll(batch, rows[-1] + 1))  # (B, rows, F)
        predicted = self._world_model.decoder(torch.stack([features[:, row] for row in rows], 1))
        begins = batch["is_first"][:, 1:].cumsum(1)
        counts = torch.stack([begins[:, row - 1] == 0 for row in rows], 1)  # (B, horizons)
        errors: dict[Metric, Tensor] = {}
        for name in self._obs_names:
            later = torch.stack([target(obs[name][:, row]) for row in rows], 1)
            last = target(obs[name][:, self.context - 1])[:, None]
            for family, guess in ((OPEN_LOOP, predicted[name]), (REPEAT_LAST, last)):
                of_horizons = _mean_error(guess, later, counts).unbind()
                errors |= {family.member(name, h): error for h, error in zip(self.horizons, of_horizons, strict=True)}
        return Numbers.of(errors)

    @torch.no_grad()
    def rollout(self, batch: TensorDict, *, num_windows: int = 1) -> OpenLoop:
        """Return whole windows to plot: the context is reconstructed, and the rows after it are predicted.

        The windows in which the fewest episodes begin are chosen. Does not synchronise.
        Shapes: batch [B, L] with B >= num_windows.
        """
        begins = batch["is_first"][:, 1:].sum(1)
        assert num_windows <= begins.shape[0], (num_windows, begins.shape)
        chosen = begins.topk(num_windows, largest=False).indices
        windows = batch[chosen]
        predicted = self._world_model.decoder(feat(self._roll(windows, self._length)))
        observed = {name: target(entry) for name, entry in self._observations(windows).items()}
        return OpenLoop(self.context, predicted, observed, begins[chosen] > 0)

    def _observations(self, batch: TensorDict) -> dict[str, Tensor]:
        return self._normaliser({name: batch["obs", name] for name in self._obs_names})

    def _roll(self, batch: TensorDict, num_rows: int) -> Belief:
        """Return the beliefs (B, num_rows, ...) of the first rows: posterior in the context, prior after it."""
        rssm, context = self._world_model.rssm, self.context
        action, is_first = batch["action"], batch["is_first"]
        assert is_first.shape[1] == self._length, (is_first.shape, self._length)
        seen = {name: entry[:, :context] for name, entry in self._observations(batch).items()}
        noise = torch.zeros(context, is_first.shape[0], rssm.stoch_dim, device=action.device)
        observed = self._world_model.observe(seen, action[:, :context], is_first[:, :context], noise).belief
        belief = Belief(observed.deter[:, -1], observed.stoch[:, -1])
        deters, stochs = [observed.deter], [observed.stoch]
        for step_action in action[:, context:num_rows].unbind(1):
            belief = rssm.prior_step(belief, step_action, noise[0])
            deters.append(belief.deter[:, None])
            stochs.append(belief.stoch[:, None])
        return Belief(torch.cat(deters, 1), torch.cat(stochs, 1))


def _mean_error(guess: Tensor, later: Tensor, counts: Tensor) -> Tensor:
    """Return the mean squared error of every horizon, over the windows that count.

    Shapes: later (B, horizons, *shape), guess like later or with one horizon for all, counts (B, horizons) bool; the
    result is (horizons,).
    """
    error = (guess - later).square().flatten(2).mean(-1)
    return error.masked_fill(~counts, 0.0).sum(0) / counts.sum(0)
