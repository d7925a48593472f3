"""Signs that a run goes wrong, read from each row of metrics before they become NaN or a wasted week.

Every sign is one function of the row and of what it remembers, and gives a warning by name, with the likely fix. A sign
that noise can show for a moment has to last for ROWS rows. None of them changes the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from learner_proc.diagnostics import HORIZONS
from learner_proc.warning_lines import WarningLines
from shared import metrics
from shared.metrics import OPEN_LOOP, SATURATED, Metric

if TYPE_CHECKING:
    from learner_proc.totals import Episodes
    from shared.config import Settings
    from shared.stream import StreamSpec

Row = Mapping[Metric, Any]
ROWS = 10  # rows of metrics for which a sign must last
FIRST_STEPS = 1000  # gradient steps before which no sign counts that needs trained networks
VALUE_SLACK = 1.5  # values above this many times what rewards allow are a sign; networks are never exact
DEAD_KL = 0.01  # nats
ALWAYS_SATURATED = 0.95  # share of an actor's samples at a limit, above which it hardly learns
ERROR_FACTOR = 10.0  # growth of the prediction error over its lowest
# The error of a prediction that is always the mean: about 1 for a normalised vector, less than 0.25 for an image.
HIGH_VECTOR_ERROR, HIGH_IMAGE_ERROR = 2.0, 0.3
ENDLESS_TICKS = 3000  # ticks of every environment after which some episode should have ended
RANDOM_STEPS = 20_000  # gradient steps after which a return should be above that of random actions
RANDOM_EPISODES = 5  # episodes of random actions that must be known


@dataclass
class Lasting:
    """Counts the rows in a row in which something was true."""

    rows: int = 0

    def after(self, true: bool) -> bool:
        """Return whether it has been true in the last ROWS rows, this one included."""
        self.rows = self.rows + 1 if true else 0
        return self.rows >= ROWS


@dataclass
class Signs:
    """Checks each row of metrics and gives warnings.

    names: returns the dimensions with clipped numbers (`RowBounds.names`); it is called only if there are new ones.
    """

    settings: Settings
    spec: StreamSpec
    warnings: WarningLines
    episodes: Episodes
    names: Callable[[], list[tuple[str, int, float]]]
    _value: Lasting = field(default_factory=Lasting)
    _kl: Lasting = field(default_factory=Lasting)
    _random: Lasting = field(default_factory=Lasting)
    _errors: dict[str, Lasting] = field(default_factory=dict)
    _saturated: dict[int, Lasting] = field(default_factory=dict)
    _lowest: dict[str, float] = field(default_factory=dict)  # prediction error of each entry
    _clipped: float = 0.0
    _masked: float = 0.0

    def check(self, row: Row) -> None:
        """Read one row. Give the warnings for which it is time."""
        self._check_arrivals(row)
        self._check_ends(row)
        if _number(row, metrics.GRADIENT_STEPS) >= FIRST_STEPS:
            self._check_value(row)
            self._check_kl(row)
            for entry in sorted(self.spec.obs):
                self._check_error(row, entry)
            for dimension in range(self.spec.action_dim):
                self._check_saturation(row, dimension)
        self._check_return(row)

    def _check_arrivals(self, row: Row) -> None:
        """Warn of numbers that were clipped and of rows that were masked since the last warning."""
        clipped, masked = _number(row, metrics.CLIPPED_VALUES), _number(row, metrics.MASKED_ROWS)
        if clipped > self._clipped and self.warnings.is_due("absurd numbers"):
            self._clipped = clipped
            self.warnings.again("absurd numbers", absurd_numbers(self.names(), self.settings))
        if masked > self._masked and self.warnings.is_due("numbers that are not finite"):
            self._masked = masked
            self.warnings.again(
                "numbers that are not finite",
                f"{masked:.0f} rows arrived with NaN or infinity in an observation, reward or action; expected finite "
                "numbers; they were replaced by zeros; look for the cause in the simulator or its wrappers",
            )

    def _check_ends(self, row: Row) -> None:
        """Warn of ends of the task that the model cannot learn, and of episodes that never end."""
        terminal = _number(row, metrics.TERMINAL_ROWS)
        if terminal > 0 and not self.settings.networks.continue_head:
            self.warnings.once(
                "terminal rows without a continue head",
                f"{terminal:.0f} rows end the task, and networks.continue_head=false, so the model does not know that "
                "an episode can end early; expected a continue head for such a task; start a new run with "
                "networks.continue_head=true",
            )
        ticks = _number(row, metrics.AGENT_STEPS) / self.spec.num_envs
        if row.get(metrics.EPISODES) == 0 and ticks > ENDLESS_TICKS:
            self.warnings.once(
                "no episode ends",
                f"no episode has ended in {ticks:.0f} steps of each environment, so there is no return to report, and "
                "the agent may stay in one place for ever; expected a task with an end or a time limit; set for "
                "example env.horizon=1000",
            )

    def _check_saturation(self, row: Row, dimension: int) -> None:
        """Warn of an action dimension that is always at a limit."""
        share = _number(row, SATURATED.member(dimension))
        if self._saturated.setdefault(dimension, Lasting()).after(share > ALWAYS_SATURATED):
            self.warnings.once(
                f"saturated action {dimension}",
                f"action dimension {dimension} is at a limit in {share:.0%} of the sampled states; expected less than "
                f"{ALWAYS_SATURATED:.0%}, because the actor hardly learns there; unless the task needs full force, "
                "widen this dimension with env.action_scale, or lower networks.init_std",
            )

    def _check_value(self, row: Row) -> None:
        """Warn if the critic promises more than any sequence of the recorded rewards can bring."""
        limit = value_limit(_number(row, metrics.REWARD_MAX), self.settings)
        values = [abs(_number(row, metric)) for metric in (metrics.IMAGINED_VALUE, metrics.VALUE_MEAN)]
        if self._value.after(limit is not None and max(values) > VALUE_SLACK * limit + 1):
            self.warnings.once(
                "values beyond all rewards",
                f"the critic's values reach {max(values):.3g}, and the rewards that were recorded allow at most "
                f"{limit:.3g} (largest reward times reward_scale / (1 - gamma)); expected values below that; the run "
                "is about to diverge: lower optimization.value_lr and optimization.actor_lr, or set "
                "optimization.slow_critic_decay=0.98",
            )

    def _check_kl(self, row: Row) -> None:
        """Warn if the posterior no longer differs from the prior."""
        kl = metrics.KL.of({metrics.KL.name: row.get(metrics.KL)})
        if self._kl.after(kl is not None and kl < DEAD_KL):
            self.warnings.once(
                "the KL is 0",
                f"the KL has been below {DEAD_KL} nats for {ROWS} rows (now {kl:.2g}): the beliefs ignore the "
                "observations; expected some nats; lower optimization.kl_scale or optimization.free_nats, and check "
                "that the observations change at all",
            )

    def _check_error(self, row: Row, entry: str) -> None:
        """Warn if the prediction error of an observation entry has grown by a factor, and is high, for long."""
        metric = OPEN_LOOP.member(entry, HORIZONS[0])
        error = metric.of({metric.name: row.get(metric)})
        if error is None:
            return
        lowest = self._lowest[entry] = min(error, self._lowest.get(entry, error))
        high = HIGH_IMAGE_ERROR if self.spec.obs[entry].is_image else HIGH_VECTOR_ERROR
        grown = error > high and error > ERROR_FACTOR * lowest
        if self._errors.setdefault(entry, Lasting()).after(grown):
            self.warnings.once(
                f"the prediction error of {entry} explodes",
                f"the model's prediction error of {entry!r} {HORIZONS[0]} steps ahead is {error:.3g}, and was "
                f"{lowest:.3g} before; expected it to fall; look at the newest observations (did the simulator "
                "change?), or lower optimization.world_model_lr",
            )

    def _check_return(self, row: Row) -> None:
        """Warn if returns are still those of random actions, with the likely causes in their order."""
        random = self.episodes.spread("random")
        means = [row.get(metric) for metric in (metrics.EPISODE_RETURN_MEAN, metrics.EVAL_RETURN_MEAN)]
        known = [mean for mean in means if mean is not None]
        late = _number(row, metrics.GRADIENT_STEPS) >= RANDOM_STEPS
        if not late or random is None or random.count < RANDOM_EPISODES or not known:
            return
        if self._random.after(max(known) <= random.mean + 0.5 * random.std):
            causes = "; ".join(likely_causes(row)) or "none of the usual causes is visible; see docs/troubleshooting.md"
            self.warnings.once(
                "the return stays at random",
                f"after {_number(row, metrics.GRADIENT_STEPS):.0f} gradient steps the mean return is {max(known):.3g}, "
                f"and random actions earn {random.mean:.3g} +- {random.std:.2g}; expected more; likely causes: "
                + causes,
            )


def absurd_numbers(names: list[tuple[str, int, float]], settings: Settings) -> str:
    """Return the warning about clipped numbers. It names at most three dimensions, those with the largest numbers."""
    shown = ", ".join(f"{name} was {largest:.3g} ({count} times)" for name, count, largest in names[:3])
    more = f" and {len(names) - 3} more dimensions" if len(names) > 3 else ""
    limit = settings.replay_buffer.max_deviation
    return (
        f"absurd numbers arrived and were clipped: {shown}{more}; expected numbers near those seen before; look at "
        "what the simulator reports there"
        + ("" if limit is None else f", or raise replay_buffer.max_deviation={limit:g} if they are right")
    )


def value_limit(reward_max: float, settings: Settings) -> float | None:
    """Return the largest value that recorded rewards allow, in scaled rewards; None without a discount."""
    gamma = settings.optimization.gamma
    return None if gamma >= 1 else settings.optimization.reward_scale * reward_max / (1 - gamma)


def likely_causes(row: Row) -> list[str]:
    """Return why a return may stay at random, the most likely cause first, as far as a row shows it."""
    causes = []
    if _number(row, metrics.KL_FREE) > 0.9:
        causes.append(
            "the KL is under the free nats, so nothing trains the prior: lower optimization.free_nats, or set "
            "optimization.kl_balance=0.8"
        )
    if _number(row, metrics.SATURATED_ACTIONS) > 0.5:
        share = _number(row, metrics.SATURATED_ACTIONS)
        causes.append(f"{share:.0%} of the action numbers are at their limits: set networks.init_std=1")
    value, recorded = _number(row, metrics.IMAGINED_VALUE), _number(row, metrics.RECORDED_RETURN)
    if value > recorded + max(1.0, 0.5 * abs(recorded)):
        causes.append(
            f"values of {value:.3g} are far above the recorded return {recorded:.3g}, so the actor uses errors of the "
            "model: lower optimization.replay_ratio"
        )
    return causes


def _number(row: Row, metric: Metric) -> float:
    """Return a number of a row, or 0 if it is not known."""
    return metric.of({metric.name: row.get(metric)}) or 0.0
