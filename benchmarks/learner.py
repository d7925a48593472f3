"""Our gradient step alone: steps/s, TFLOP/s and the share of the measured floor, by size, precision and compilation.

    python -m benchmarks.learner                                  # 50, 500, 2,500 frames (GPU: 10,000 and 50,000 too)
    python -m benchmarks.learner --frames 50 --phases             # also the time of every phase
    python -m benchmarks.learner --scaling                        # also steps/s and memory over the batch size
    python -m benchmarks.learner --device cuda --json out.json

The floor is the time of the step's matrix products, each timed alone, plus Adam's memory traffic at copy bandwidth
(`floor.py`); the share is floor / step. On one CPU thread all times are CPU times; on a GPU they are wall times with
the device synchronised. Captured graphs need a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

from benchmarks import provenance, timing
from benchmarks.floor import Floor, copy_bandwidth, measure_floor, square_matmul_tflops
from benchmarks.phases import phase_ms
from benchmarks.step_cases import SPEC, first_calls_s, forget_compiled, our_step, settings_for, synthetic_batch
from learner_proc import startup
from shared.config import Settings
from shared.geometry import Geometry

NAME = "learner"
CPU_FRAMES, GPU_FRAMES = (50, 500, 2500), (50, 500, 2500, 10_000, 50_000)
CPU_SCALING = (50, 150, 500, 1000, 2500)
GPU_SCALING = (2500, 5000, 10_000, 25_000, 50_000, 100_000, 200_000)
PRECISIONS = ("false", "bfloat16")
SPELLED = {"false": "fp32", "bfloat16": "bf16"}
DTYPES = {"false": torch.float32, "bfloat16": torch.bfloat16}
REPETITIONS = {50: 30, 500: 10}  # by size
FEW = 5  # at all other sizes, where a step takes seconds


@dataclass(frozen=True)
class Variant:
    """One way of running the step."""

    precision: str
    compiled: bool
    captured: bool = False

    @property
    def name(self) -> str:
        """Return the name used in tables and result files."""
        how = "graph" if self.captured else "compiled" if self.compiled else "eager"
        return f"{SPELLED[self.precision]} {how}"


def run(
    frames: Sequence[int] | None = None,
    *,
    precisions: Sequence[str] = PRECISIONS,
    compiled: Sequence[bool] = (False, True),
    phases: bool = False,
    scaling: bool = False,
    scaling_frames: Sequence[int] | None = None,
    repetitions: int | None = None,
    device: str = "cpu",
    threads: int = 1,
    tiny: bool = False,
) -> dict[str, Any]:
    """Measure every variant at every size, and on request the phases and the scaling curve.

    `tiny` shrinks the networks to check that everything runs.
    """
    torch.set_num_threads(threads)
    where = torch.device(device)
    gpu = where.type == "cuda"
    if not gpu:
        startup.keep_freed_memory()  # as the learner does
    else:
        torch.set_float32_matmul_precision("high")
    variants = [Variant(precision, flag) for precision in precisions for flag in compiled]
    left_out = []
    if why := no_capture(where):
        left_out.append(f"captured graphs: {why}")
    else:
        variants += [Variant(precision, True, captured=True) for precision in precisions]
    bench = Bench(where, repetitions, tiny, copy_bandwidth(where))
    sizes = frames or (GPU_FRAMES if gpu else CPU_FRAMES)
    result: dict[str, Any] = {
        "device": device,
        "threads": threads,
        "clock": bench.clock,
        "square_matmul_tflops": {SPELLED[p]: square_matmul_tflops(DTYPES[p], where) for p in precisions},
        "copy_gb_s": bench.bandwidth / 1e9,
        "steps": [row for count in sizes for row in bench.measure(count, variants)],
        "left_out": left_out,
    }
    if phases:
        result["phases"] = [row for count in sizes for row in bench.phases(count, variants)]
    if scaling:
        best = _fastest(result["steps"], variants)
        counts = scaling_frames or (GPU_SCALING if gpu else CPU_SCALING)
        result["scaling"] = {"variant": best.name, "rows": [bench.scale(count, best) for count in counts]}
    return result


def no_capture(device: torch.device) -> str | None:
    """Return why the step cannot be captured into a CUDA graph on this device; None if it can."""
    return None if device.type == "cuda" else "no CUDA device"


@dataclass(frozen=True)
class Bench:
    """One device, the number of repetitions on it, and its copy bandwidth in bytes per second."""

    device: torch.device
    repetitions: int | None
    tiny: bool
    bandwidth: float

    @property
    def clock(self) -> str:
        """Return which clock counts: CPU time on one CPU thread, wall time otherwise."""
        return "cpu" if self.device.type == "cpu" and torch.get_num_threads() == 1 else "wall"

    def measure(self, frames: int, variants: Sequence[Variant]) -> list[dict[str, Any]]:
        """Measure every variant at one size, in turns."""
        forget_compiled()
        floors = {
            precision: self.floor(frames, precision) for precision in dict.fromkeys(v.precision for v in variants)
        }
        built = {variant.name: self.build(frames, variant) for variant in variants}
        calls = {name: call for name, (call, _) in built.items()}
        turns = self.repetitions or REPETITIONS.get(frames, FEW)
        samples = timing.interleave(calls, repetitions=turns, warmup=1, device=self.device.type)
        rows = []
        for variant in variants:
            taken, floor = samples[variant.name].describe(), floors[variant.precision]
            seconds = taken[f"{self.clock}_ms_median"] / 1e3
            rows.append({
                "frames": frames,
                "variant": variant.name,
                **taken,
                "first_call_s": round(built[variant.name][1], 2),
                "steps_per_s": 1 / seconds,
                "frames_per_s": frames / seconds,
                "tflops": floor.flops / seconds / 1e12,
                "share_of_floor": floor.seconds / seconds,
                **floor.describe(),
            })  # fmt: skip
        return rows

    def build(self, frames: int, variant: Variant) -> tuple[Callable[[], Any], float]:
        """Return a step that was called once on its batch, and the seconds of that call."""
        settings = settings_for(frames, precision=variant.precision, compiled=variant.compiled, tiny=self.tiny)
        if variant.captured:
            call = captured_step(settings, device=self.device)
        else:
            step, batch = our_step(settings, device=self.device), self.batch(frames)
            call = lambda: step(batch)  # noqa: E731 - a closure over this step
        return call, first_calls_s(call, calls=1)

    def batch(self, frames: int) -> TensorDict:
        """Return a batch of noise on the device."""
        return synthetic_batch(frames, device=self.device)

    def floor(self, frames: int, precision: str) -> Floor:
        """Measure the floor of an uncompiled step at one size and precision."""
        step = our_step(settings_for(frames, precision=precision, tiny=self.tiny), device=self.device)
        batch, counts = self.batch(frames), step.parameter_counts()
        step(batch)
        num_params = counts["model"] + counts["actor"] + counts["critic"]
        return measure_floor(lambda: step(batch), num_params=num_params, device=self.device, bandwidth=self.bandwidth)

    def phases(self, frames: int, variants: Sequence[Variant]) -> list[dict[str, Any]]:
        """Measure the milliseconds of every phase. Captured steps are left out: their phases cannot be timed."""
        rows = []
        for variant in variants:
            if variant.captured:
                continue
            settings = settings_for(frames, precision=variant.precision, compiled=variant.compiled, tiny=self.tiny)
            step, batch = our_step(settings, device=self.device), self.batch(frames)
            turns = self.repetitions or FEW
            found = phase_ms(step, batch, repetitions=turns, clock=self.clock)
            rows.append({"frames": frames, "variant": variant.name, "ms": found})
        return rows

    def scale(self, frames: int, variant: Variant) -> dict[str, Any]:
        """Measure steps/s and peak memory at one size; return the error if it does not fit into memory."""
        forget_compiled()
        forget_peak(self.device)
        try:
            call, _ = self.build(frames, variant)
            if self.device.type == "cpu":
                forget_peak(self.device)  # compiling needs more memory than the step
            samples = timing.interleave(
                {"": call}, repetitions=self.repetitions or FEW, warmup=1, device=self.device.type
            )
        except torch.OutOfMemoryError as error:
            return {"frames": frames, "failed": str(error).splitlines()[0]}
        seconds = samples[""].describe()[f"{self.clock}_ms_median"] / 1e3
        return {
            "frames": frames,
            "steps_per_s": 1 / seconds,
            "frames_per_s": frames / seconds,
            "peak_gib": peak_bytes(self.device) / 2**30,
        }


def captured_step(settings: Settings, *, device: torch.device) -> Callable[[], Any]:
    """Return the whole update, sampling included, as one CUDA graph over a replay full of noise."""
    compiling: Any = settings.optimization.compile
    compiling.cudagraphs = True
    geometry = Geometry.of(settings, SPEC.num_envs)
    on_gpu = settings.replay_buffer.gpu_storage is not False
    replay, _ = startup.allocate_replay(SPEC, settings, geometry, device=device, on_gpu=on_gpu)
    for name in SPEC.obs:
        replay.views["obs", name].normal_()
    replay.views["action"].uniform_(-1, 1)
    replay.views["reward"].normal_()
    replay.restore(geometry.capacity)
    step = our_step(settings, device=device)
    return startup.build_step(step, replay, settings, geometry, device=device)


def forget_peak(device: torch.device) -> None:
    """Reset the peak that `peak_bytes` reports, after returning free memory to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    ctypes.CDLL(None).malloc_trim(0)
    # The value 5 makes the memory that is resident now the new peak; see the manual page of proc_pid_clear_refs.
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory since `forget_peak`: of the device, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def _fastest(steps: list[dict[str, Any]], variants: Sequence[Variant]) -> Variant:
    largest = max(row["frames"] for row in steps)
    best = max((row for row in steps if row["frames"] == largest), key=lambda row: row["steps_per_s"])
    return next(variant for variant in variants if variant.name == best["variant"])


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the table's lines: every variant with its floor as the peer, then phases and scaling."""
    lines, clock = [], result["clock"]
    for row in result["steps"]:
        text = f"{row['tflops']:.3g} TFLOP/s, share {100 * row['share_of_floor']:.0f} %"
        name, ms = f"step, {row['frames']} frames, {row['variant']}", row[f"{clock}_ms_median"]
        lines.append(timing.row(name, ms, f"{clock} ms (peer: floor)", peer=row["floor_ms"], bar=text))
    for row in result.get("phases", []):
        total = sum(row["ms"].values())
        for phase, ms in row["ms"].items():
            name = f"{row['frames']}, {row['variant']}: {phase}"
            lines.append(timing.row(name, ms, f"{clock} ms", bar=f"{100 * ms / total:.0f} %"))
    scaling = result.get("scaling", {"variant": "", "rows": []})
    for row in scaling["rows"]:
        name = f"scaling, {row['frames']} frames, {scaling['variant']}"
        text = row.get("failed") or f"{row['peak_gib']:.2f} GiB peak"
        lines.append(timing.row(name, row.get("steps_per_s"), "steps/s", bar=text))
    return lines


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", help="batch sizes, in frames")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--compiled", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--phases", action="store_true", help="also time the phases of a step")
    parser.add_argument("--scaling", action="store_true", help="also measure steps/s and memory over the batch size")
    parser.add_argument("--scaling-frames", type=int, nargs="+", help="batch sizes of the scaling curve")
    parser.add_argument("--repetitions", type=int, help="turns; default by size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = vars(parser.parse_args())
    path = options.pop("json")
    options["compiled"] = [value == "on" for value in options["compiled"]]
    result = run(**options)
    timing.show("Gradient step alone", rows(result))
    for line in result["left_out"]:
        print(f"left out: {line}")
    provenance.save(path, provenance.document(NAME, result))


if __name__ == "__main__":
    main()
