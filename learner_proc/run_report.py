"""A run looked at: returns, losses and what the model predicts, as one page of pictures.

    python -m learner_proc.run_report runs/NAME          writes runs/NAME/report/index.html

The curves come from metrics.jsonl. The open-loop pictures come from the newest checkpoint: the model sees five rows of a
window drawn from the replay, then predicts the rest from the recorded actions alone.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from pathlib import Path
from typing import Any

import torch

from learner_proc.diagnostics import WINDOW_LENGTH, Diagnostics, OpenLoop
from learner_proc.startup import open_run
from shared.errors import SettingError

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("returns", ("eval_return_mean", "episode_return_mean", "random_return_mean")),
    ("imagined against recorded return (scaled, discounted)", ("imagined_return", "imagined_value", "recorded_return")),
    ("world model, nats", ("loss_obs", "loss_reward", "loss_cont")),
    ("KL, nats", ("kl",)),
    (
        "share of batches without KL gradient, of clipped gradients",
        ("kl_free", "clipped_model", "clipped_actor", "clipped_value"),
    ),
    ("actor", ("actor_entropy", "actor_std")),
    ("value bias (scaled)", ("value_bias",)),
    ("policy version: newest, and mean of sampled rows", ("policy_version", "sampled_version_mean")),
)
MAX_DIMENSIONS, STRIP_STEPS = 6, 10


def write_report(run_dir: Path) -> Path:
    """Draw every picture into `report/` of the run folder; returns the page.

    Raises: SettingError if the run has no rows or no checkpoint with a replay, or matplotlib is missing.
    """
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    rows = [row for row in map(json.loads, lines) if row["loss_model"] is not None]
    if not rows:
        raise SettingError(
            f"{metrics} holds no row of a gradient step; wanted the folder of a run that has trained; mend the path, "
            "or let the run go on for optimization.log_every steps"
        )
    _pyplot()
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    settings, step, replay = open_run(run_dir)
    length = min(WINDOW_LENGTH, replay.num_rows)
    diagnostics = Diagnostics(step.spec, step.world_model, step.policy.normaliser, length=length)
    _draw_curves(rows, settings.optimization.free_nats, folder / "curves.png")
    _draw_errors(rows, folder / "open_loop_error.png")
    rollout = diagnostics.rollout(replay.sample(64, length), num_windows=3)
    for name in rollout.observed:
        draw = _draw_images if rollout.observed[name].dim() == 5 else _draw_vectors
        draw(rollout, name, folder / f"open_loop_{name}.png")
    page = folder / "index.html"
    page.write_text(_page(run_dir, rows[-1], sorted(path.name for path in folder.glob("*.png"))))
    return page


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise SettingError(
            "matplotlib is not installed; wanted it for the report; run: pip install -e '.[report]'"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _series(rows: list[dict], key: str) -> tuple[list[float], list[float]]:
    points = [(row["gradient_steps"], row[key]) for row in rows if row.get(key) is not None]
    return [x for x, _ in points], [y for _, y in points]


def _draw_curves(rows: list[dict], free_nats: float | None, out: Path) -> None:
    plt = _pyplot()
    figure, axes = plt.subplots(4, 2, figsize=(11, 11), sharex=True)
    for axis, (title, keys) in zip(axes.flat, PANELS, strict=True):
        for key in keys:
            steps, values = _series(rows, key)
            if values:
                axis.plot(steps, values, label=key, linewidth=1.3)
        if keys == ("kl",) and free_nats is not None:
            axis.axhline(free_nats, color="grey", linestyle=":", label="free nats")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        if axis.lines:
            axis.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for axis in axes[-1]:
        axis.set_xlabel("gradient steps")
    _save(figure, out)


def _draw_errors(rows: list[dict], out: Path) -> None:
    """Open-loop error of every horizon as a share of the error of repeating the last observation."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 3.4))
    for key in sorted(k for k in rows[-1] if k.startswith("open_loop_")):
        still = key.replace("open_loop", "repeat_last")
        points = [(row["gradient_steps"], row[key] / row[still]) for row in rows if row.get(key) and row.get(still)]
        axis.plot(*zip(*points, strict=True), label=key.removeprefix("open_loop_")) if points else None
    axis.axhline(1.0, color="grey", linestyle=":", label="repeat the last observation")
    axis.set(yscale="log", xlabel="gradient steps", ylabel="open-loop error / still's")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    _save(figure, out)


def _draw_vectors(rollout: OpenLoop, name: str, out: Path) -> None:
    """Predicted beside observed, one column per window, one row per dimension."""
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
    figure.suptitle(f"observation entry '{name}', normalised: the model sees the grey part, then predicts", fontsize=10)
    _save(figure, out)


def _draw_images(rollout: OpenLoop, name: str, out: Path) -> None:
    """Strips of frames: observed above, predicted below, for every window."""
    plt = _pyplot()
    observed, predicted = rollout.observed[name], rollout.predicted[name]  # (n, L, 64, 64, C)
    steps = torch.linspace(0, observed.shape[1] - 1, STRIP_STEPS).long().tolist()
    figure, axes = plt.subplots(2 * len(observed), STRIP_STEPS, figsize=(11, 2.4 * len(observed)), squeeze=False)
    for window in range(len(observed)):
        for column, step in enumerate(steps):
            for line, images in enumerate((observed, predicted)):
                axis = axes[2 * window + line][column]
                axis.imshow((images[window, step] + 0.5).clamp(0, 1).expand(-1, -1, 3).numpy())
                axis.set(xticks=[], yticks=[])
                if line == 0:
                    axis.set_title(f"{step}{' seen' if step < rollout.context else ''}", fontsize=7)
    figure.suptitle("observed above, predicted below", fontsize=10)
    _save(figure, out)


def _save(figure: Any, out: Path) -> None:
    figure.tight_layout()
    figure.savefig(out, dpi=90)
    _pyplot().close(figure)


CAPTIONS = {
    "open_loop_error": "Below 1 the model predicts better than a still picture. Read 5 steps first, then the imagination "
    "horizon (15). At 50 steps a task near an unstable balance is beyond prediction, and what rests is best predicted by "
    "a still.",
    "curves": "Clipped gradients are not a fault: Adam is indifferent to their scale. A KL under the free nats trains no "
    "prior. A value far above the recorded return says that the actor found errors of the model.",
}


def _page(run_dir: Path, row: dict, pictures: list[str]) -> str:
    shown = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{value:.5g}</td></tr>"
        for key, value in row.items()
        if isinstance(value, int | float) and key != "time"
    )
    images = "".join(
        f'<h2>{name[:-4].replace("_", " ")}</h2><p>{CAPTIONS.get(name[:-4], "")}</p><img src="{name}">'
        for name in pictures
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(run_dir.name)}</title>"
        "<style>body{font:15px sans-serif;max-width:1050px;margin:2em auto}img{max-width:100%}td{padding:1px 12px}</style>"
        f"<h1>{html.escape(run_dir.name)}</h1>{images}<h2>last row</h2><table>{shown}</table>\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with a checkpoint")
    try:
        page = write_report(parser.parse_args().run)
    except SettingError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{page}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
