"""Draws a page of pictures about a run: returns, losses, and predictions of the world model.

    python -m learner_proc.run_report runs/NAME          writes runs/NAME/report/index.html

The curves come from metrics.jsonl. The open-loop pictures come from the newest checkpoint: the model observes the first
rows of a window from the replay, then predicts the rest from the recorded actions alone.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from learner_proc.diagnostics import WINDOW_LENGTH, Diagnostics, OpenLoop
from learner_proc.evaluation import read_evaluations
from learner_proc.startup import open_run
from shared import metrics
from shared.errors import SettingError
from shared.lifetime import ExitCode
from shared.metrics import GRADIENT_STEPS, KL, LOSS_MODEL, METRICS, OPEN_LOOP, REPEAT_LAST, Metric, find, parse_row
from shared.run_folder import RunFolder

RETURNS = "returns"  # the panel in which the evaluations are drawn too
PANELS: dict[str, tuple[Metric, ...]] = {
    RETURNS: (metrics.EPISODE_RETURN_MEAN, metrics.RANDOM_RETURN_MEAN),
    "imagined against recorded return (scaled, discounted)": (
        metrics.IMAGINED_RETURN,
        metrics.IMAGINED_VALUE,
        metrics.RECORDED_RETURN,
    ),
    "world model, nats": (metrics.LOSS_OBS, metrics.LOSS_REWARD, metrics.LOSS_CONT),
    "KL, nats": (KL,),
    "share of batches without KL gradient, of clipped gradients": (
        metrics.KL_FREE,
        metrics.CLIPPED_MODEL,
        metrics.CLIPPED_ACTOR,
        metrics.CLIPPED_VALUE,
    ),
    "actor": (metrics.ACTOR_ENTROPY, metrics.ACTOR_STD),
    "value bias (scaled)": (metrics.VALUE_BIAS,),
    "policy version: newest, and mean of sampled rows": (metrics.POLICY_VERSION, metrics.SAMPLED_VERSION_MEAN),
}
NUM_WINDOWS = 64  # sampled; the NUM_DRAWN of them in which the fewest episodes begin are drawn
NUM_DRAWN = 3
MAX_DIMENSIONS = 6  # of a vector that is drawn
STRIP_STEPS = 10  # images in a row of a strip
CURVES, ERRORS = "curves", "open_loop_error"  # names of pictures
CAPTIONS = {
    ERRORS: "Below 1, the model predicts better than a repetition of the last observation. Look at 5 steps first, "
    "then at the imagination horizon (15). At 50 steps, a task near an unstable balance cannot be predicted, and for "
    "an object at rest no prediction is better than the repetition.",
    CURVES: "Clipped gradients are no fault, because Adam does not depend on their scale. A KL below the free nats "
    "does not train the prior. A value far above the recorded return means that the actor exploits model errors.",
}


def write_report(run_dir: Path) -> Path:
    """Draw every picture into `report/` of the run folder and return the page that shows them.

    Raises: SettingError if the run has no rows or no checkpoint with a replay, or if matplotlib is missing.
    """
    rows = _trained_rows(RunFolder(run_dir).metrics)
    _pyplot()
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    _, step, replay = open_run(run_dir)
    length = min(WINDOW_LENGTH, replay.num_rows)
    diagnostics = Diagnostics(step.spec, step.world_model, step.policy.normaliser, length=length)
    evaluations = read_evaluations(RunFolder(run_dir).evaluations)
    _draw_curves(rows, evaluations, step.world_model.free_nats, folder / f"{CURVES}.png")
    _draw_errors(rows, sorted(step.spec.obs), diagnostics.horizons, folder / f"{ERRORS}.png")
    rollout = diagnostics.rollout(replay.sample(NUM_WINDOWS, length), num_windows=NUM_DRAWN)
    for name, observed in rollout.observed.items():
        draw = _draw_images if observed.dim() == 5 else _draw_vectors
        draw(rollout, name, folder / f"open_loop_{name}.png")
    page = folder / "index.html"
    page.write_text(_page(run_dir, rows[-1], sorted(path.stem for path in folder.glob("*.png"))))
    return page


def _trained_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl since the first gradient step. Raises: SettingError if there are none.

    Lines that are no rows are left out: while the run is active, the last line may be incomplete.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows = [row for row in map(parse_row, lines) if row is not None and LOSS_MODEL.of(row) is not None]
    if not rows:
        raise SettingError(
            f"{path} has no row of a gradient step; expected the folder of a run that has trained; "
            "correct the path, or let the run continue for optimization.log_every steps"
        )
    return rows


def _pyplot() -> Any:
    """Return matplotlib.pyplot, set up to draw into files. Raises: SettingError if it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise SettingError(
            "matplotlib is not installed; expected it, because the report is drawn with it; "
            "run: pip install -e '.[report]'"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _draw_curves(rows: list[dict], evaluations: list[dict], free_nats: float, out: Path) -> None:
    """Draw every panel of PANELS over the gradient steps, and the evaluations in the panel of the returns."""
    plt = _pyplot()
    figure, axes = plt.subplots(4, 2, figsize=(11, 11), sharex=True)
    for axis, (title, panel) in zip(axes.flat, PANELS.items(), strict=True):
        for metric in panel:
            points = [(GRADIENT_STEPS.of(row), metric.of(row)) for row in rows if metric.of(row) is not None]
            _plot_points(axis, points, label=metric.name, linewidth=1.3)
        if title == RETURNS and evaluations:
            _draw_evaluations(axis, evaluations)
        if panel == (KL,):
            axis.axhline(free_nats, color="grey", linestyle=":", label="free nats")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        if axis.lines:
            axis.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for axis in axes[-1]:
        axis.set_xlabel("gradient steps")
    _save(figure, out)


def _draw_evaluations(axis: Any, evaluations: list[dict]) -> None:
    """Draw the mean of every evaluation, and its interval if it has one, where its policy version was published."""
    names = ("gradient_steps", "mean", "low", "high")
    steps, mean, low, high = ([METRICS[f"evaluation_{name}"].of(row) for row in evaluations] for name in names)
    axis.plot(steps, mean, color="black", linewidth=1.3, label="evaluation")
    if None not in low:
        axis.fill_between(steps, low, high, color="black", alpha=0.15, linewidth=0)


def _draw_errors(rows: list[dict], entries: Iterable[str], horizons: Iterable[int], out: Path) -> None:
    """Draw the open-loop error at every horizon, divided by the error of repeating the last observation."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 3.4))
    for entry, horizon in [(entry, horizon) for entry in entries for horizon in horizons]:
        points = []
        for row in rows:
            error, repeated = OPEN_LOOP.member(entry, horizon).of(row), REPEAT_LAST.member(entry, horizon).of(row)
            if error and repeated:
                points.append((GRADIENT_STEPS.of(row), error / repeated))
        _plot_points(axis, points, label=f"{entry}_{horizon}")
    axis.axhline(1.0, color="grey", linestyle=":", label="repeat the last observation")
    axis.set(yscale="log", xlabel="gradient steps", ylabel="error / error of repeating")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    _save(figure, out)


def _plot_points(axis: Any, points: list[tuple[float | None, float | None]], **style: Any) -> None:
    """Add a line to a panel, unless there are no points."""
    if points:
        axis.plot([x for x, _ in points], [y for _, y in points], **style)


def _draw_vectors(rollout: OpenLoop, name: str, out: Path) -> None:
    """Draw the predicted and the observed vectors: one column per window, one row per dimension."""
    plt = _pyplot()
    observed, predicted = rollout.observed[name], rollout.predicted[name]  # (n, L, size)
    size = min(MAX_DIMENSIONS, observed.shape[-1])
    figure, axes = plt.subplots(size, len(observed), figsize=(11, 1.6 * size), sharex=True, squeeze=False)
    for window in range(len(observed)):
        for dimension in range(size):
            axis = axes[dimension][window]
            axis.plot(observed[window, :, dimension], color="black", linewidth=1.2, label="observed")
            axis.plot(predicted[window, :, dimension], color="tab:orange", linewidth=1.2, label="predicted")
            axis.axvspan(0, rollout.context - 1, color="grey", alpha=0.2)
            axis.grid(alpha=0.2)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="upper right", ncols=2, frameon=False, fontsize=8)
    for dimension in range(size):
        axes[dimension][0].set_ylabel(f"[{dimension}]")
    for axis in axes[-1]:
        axis.set_xlabel("agent steps")
    figure.suptitle(
        f"observation entry '{name}', normalised: the model observes the grey part, then predicts", fontsize=10
    )
    _save(figure, out)


def _draw_images(rollout: OpenLoop, name: str, out: Path) -> None:
    """Draw two strips of images for every window: observed above, predicted below."""
    plt = _pyplot()
    observed, predicted = rollout.observed[name], rollout.predicted[name]  # (n, L, 64, 64, C)
    steps = torch.linspace(0, observed.shape[1] - 1, STRIP_STEPS).long().tolist()
    figure, axes = plt.subplots(2 * len(observed), STRIP_STEPS, figsize=(11, 2.4 * len(observed)), squeeze=False)
    for window in range(len(observed)):
        for column, step in enumerate(steps):
            for strip, images in enumerate((observed, predicted)):
                axis = axes[2 * window + strip][column]
                axis.imshow((images[window, step] + 0.5).clamp(0, 1).expand(-1, -1, 3).numpy())
                axis.set(xticks=[], yticks=[])
                if strip == 0:
                    axis.set_title(f"{step}{' observed' if step < rollout.context else ''}", fontsize=7)
    figure.suptitle("observed above, predicted below", fontsize=10)
    _save(figure, out)


def _save(figure: Any, out: Path) -> None:
    """Write a figure to a file and free it."""
    figure.tight_layout()
    figure.savefig(out, dpi=90)
    _pyplot().close(figure)


def _page(run_dir: Path, row: dict, pictures: list[str]) -> str:
    """Return the page: the pictures of these names with their captions, then the numbers of the last row."""
    numbers = ((metric, metric.of(row)) for metric in map(find, row) if metric is not None and metric != metrics.TIME)
    table = "".join(
        f"<tr><td>{html.escape(metric.name)}</td><td>{value:.5g}</td></tr>"
        for metric, value in numbers
        if value is not None
    )
    images = "".join(
        f'<h2>{name.replace("_", " ")}</h2><p>{CAPTIONS.get(name, "")}</p><img src="{name}.png">' for name in pictures
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(run_dir.name)}</title>"
        "<style>body{font:15px sans-serif;max-width:1050px;margin:2em auto}"
        "img{max-width:100%}td{padding:1px 12px}</style>"
        f"<h1>{html.escape(run_dir.name)}</h1>{images}<h2>last row</h2><table>{table}</table>\n"
    )


def main() -> int:
    """Write the report and print the path of its page. Returns 0, or ExitCode.REFUSED if the run cannot be shown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with a checkpoint")
    try:
        page = write_report(parser.parse_args().run)
    except SettingError as error:
        sys.stderr.write(f"error: {error}\n")
        return ExitCode.REFUSED
    except OSError as error:
        sys.stderr.write(
            f"error: cannot read the run or write its report: {error}; expected a folder in which this user may write; "
            "correct the path or its permissions, or copy the folder\n"
        )
        return ExitCode.REFUSED
    sys.stdout.write(f"{page}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
