"""Our gradient step beside TorchRL's: the same networks and batch, in one process with one thread, in turns.

    python -m benchmarks.peer_torchrl                                 # 50, 500 and 2,500 frames, all modes
    python -m benchmarks.peer_torchrl --frames 50 500 --modes eager --json out.json
    python -m benchmarks.peer_torchrl --networks recipe               # TorchRL with its own recipe's layers
    python -m benchmarks.peer_torchrl --frames 10000 50000 --device cuda

TorchRL runs in the modes that its recipe offers: eager, with the RSSM step compiled, with actor and value loss
compiled, and with all three compiled; each in float32 and under bfloat16 autocast. Compiling its whole world-model loss
is left out: the compiler unrolls 50 steps, and one window took a quarter of an hour.

Every mode is first timed alone, with nothing else compiled in the process: torch finds compiled code by its source, so
two modes of one loss would share a cache entry. Then the fastest mode of each side is built again and both take turns.
This duel is the comparison, in CPU time, or in wall time on a GPU. First calls include compilation and are not timed;
the result lists their seconds separately.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import agreement, provenance, timing
from benchmarks.step_cases import first_calls_s, forget_compiled, our_step, settings_for, synthetic_batch
from benchmarks.torchrl_update import EAGER_CALLS, MODES, OURS, RECIPE, Sizes, TorchRLUpdate, to_torchrl
from learner_proc.startup import keep_freed_memory

NAME = "peer_torchrl"
FRAMES, GPU_FRAMES = (50, 500, 2500), (50, 500, 2500, 10_000, 50_000)
BARS = {50: 2.5}  # target ratios by size
BAR = 2.0  # at every other size
PRECISIONS = ("false", "bfloat16")
SPELLED = {"false": "fp32", "bfloat16": "bf16"}
NETWORKS = {"same": OURS, "recipe": RECIPE}
TINY = Sizes(state=4, deter=8, hidden=16, embed=16, encoder_activated=True, decoder_depth=3, actor_depth=4, horizon=3)
REPETITIONS = {50: 30, 500: 10}  # by size
FEW = 5  # at all other sizes, where a step takes seconds
LEFT_OUT = ["torchrl, whole world-model loss compiled: one window of 50 steps takes a quarter of an hour"]
Case = Callable[[], Callable[[], Any]]  # builds a step on its batch


@dataclass(frozen=True)
class Bench:
    """What is measured at every size. With a mode other than "eager", our step is measured compiled, too."""

    modes: Sequence[str] = MODES
    precisions: Sequence[str] = PRECISIONS
    networks: str = "same"
    repetitions: int | None = None
    device: str = "cpu"
    tiny: bool = False  # small networks, to check that everything runs

    @property
    def clock(self) -> str:
        """Return which clock counts."""
        return "cpu" if self.device == "cpu" else "wall"

    def turns(self, frames: int) -> int:
        """Return the number of turns at one size."""
        return self.repetitions or REPETITIONS.get(frames, FEW)


def run(frames: Sequence[int] | None = None, *, threads: int = 1, **options: Any) -> dict[str, Any]:
    """Measure every size: each mode alone, then the duel of the fastest. Also compare the losses of both sides.

    `options` are the fields of `Bench`.
    """
    bench = Bench(**options)
    torch.set_num_threads(threads)
    device = torch.device(bench.device)
    if device.type == "cpu":
        keep_freed_memory()  # as the learner does; it helps both sides
    else:
        torch.set_float32_matmul_precision("high")  # as in the recipe, for both sides
    compiled = any(mode != "eager" for mode in bench.modes)
    return {
        "networks": bench.networks,
        "threads": threads,
        "device": bench.device,
        "sizes": [_measure(count, bench) for count in frames or (GPU_FRAMES if device.type == "cuda" else FRAMES)],
        "agreement": agreement.with_torchrl(device=device, tiny=bench.tiny),
        "fast_against_plain": agreement.fast_against_plain(device=device, compiled=compiled, tiny=bench.tiny),
        "left_out": LEFT_OUT,
    }


def _cases(frames: int, bench: Bench) -> dict[str, Case]:
    """Return every step to be timed at one size, by name. Steps are not built yet."""
    device = torch.device(bench.device)
    sizes = TINY if bench.tiny else NETWORKS[bench.networks]
    batch = synthetic_batch(frames, device=device)
    theirs = to_torchrl(batch, sizes)

    def ours(precision: str, compiled: bool) -> Callable[[], Any]:
        settings = settings_for(frames, precision=precision, compiled=compiled, tiny=bench.tiny)
        step = our_step(settings, device=device)
        return lambda: step(batch)

    def peer(precision: str, mode: str) -> Callable[[], Any]:
        update = TorchRLUpdate(sizes, precision=precision, mode=mode, device=device)
        return lambda: update(theirs)

    cases: dict[str, Case] = {}
    for precision in bench.precisions:
        for compiled in (False, True) if set(bench.modes) - {"eager"} else (False,):
            name = f"ours {'compiled' if compiled else 'eager'} {SPELLED[precision]}"
            cases[name] = lambda p=precision, c=compiled: ours(p, c)
        for mode in bench.modes:
            cases[f"torchrl {mode} {SPELLED[precision]}"] = lambda p=precision, m=mode: peer(p, m)
    return cases


def _measure(frames: int, bench: Bench) -> dict[str, Any]:
    cases, median = _cases(frames, bench), f"{bench.clock}_ms_median"
    alone: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for name, case in cases.items():
        try:
            alone[name] = _alone(case, min(FEW, bench.turns(frames)), bench)
        except Exception as error:  # a failure is reported in the result and does not stop the others
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        print(f"  {frames} frames, {name}: {alone[name][median]:.4g} ms {bench.clock}", flush=True)
    best = {
        side: min((name for name in alone if name.startswith(side)), key=lambda name: alone[name][median])
        for side in ("ours", "torchrl")
    }
    forget_compiled()
    calls = {side: _warm(cases[name])[0] for side, name in best.items()}
    samples = timing.interleave(calls, repetitions=bench.turns(frames), warmup=1, device=bench.device)
    duel = {side: taken.describe() for side, taken in samples.items()}
    print(f"  {frames} frames, duel: " + ", ".join(f"{best[s]} {duel[s][median]:.4g} ms" for s in best), flush=True)
    return {
        "frames": frames,
        "clock": bench.clock,
        "alone": alone,
        "failed": failed,
        "best": best,
        "duel": duel,
        "steps_per_s": {side: 1e3 / taken["wall_ms_median"] for side, taken in duel.items()},
        "ratio": timing.ratio(samples["ours"], samples["torchrl"], bench.clock),
        "bar": BARS.get(frames, BAR),
    }


def _alone(case: Case, repetitions: int, bench: Bench) -> dict[str, Any]:
    forget_compiled()
    call, seconds = _warm(case)
    taken = timing.interleave({"": call}, repetitions=repetitions, warmup=1, device=bench.device)[""]
    return {**taken.describe(), "first_calls_s": round(seconds, 2)}


def _warm(case: Case) -> tuple[Callable[[], Any], float]:
    call = case()
    return call, first_calls_s(call, calls=EAGER_CALLS + 2)


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one line of the table per duel, mode and comparison."""
    lines = []
    for size in result["sizes"]:
        lines += _size_rows(size)
    for key, title in (("agreement", "same weights, noise"), ("fast_against_plain", "plain / fast")):
        for found in result[key]["terms"]:
            bar = f"{found['difference']:.1e} <= {found['tolerance']:g}: {'yes' if found['agrees'] else 'NO'}"
            lines.append(timing.row(f"{title}: {found['name']}", found["ours"], "", peer=found["other"], bar=bar))
    return lines


def _size_rows(size: dict[str, Any]) -> list[dict[str, Any]]:
    clock, duel, spread = size["clock"], size["duel"], size["ratio"]
    median, unit = f"{clock}_ms_median", f"{clock} ms"
    bar = f">= {size['bar']}x (turns {spread['min']:.2f}..{spread['max']:.2f})"
    ours, theirs = duel["ours"][median], duel["torchrl"][median]
    lines = [timing.row(f"{size['frames']} frames", ours, unit, peer=theirs, times=spread["median"], bar=bar)]
    for name, case in size["alone"].items():
        reach = f"{case[f'{clock}_ms_min']:.4g}..{case[f'{clock}_ms_max']:.4g}"
        mark = " <" if name in size["best"].values() else ""
        figure, own = case[median], name.startswith("ours")
        label = f"  {name.split(' ', 1)[1]}{mark}"
        lines.append(timing.row(label, figure if own else None, unit, peer=None if own else figure, bar=reach))
    return lines + [timing.row(f"  {name} FAILED", None, why[:50]) for name, why in size["failed"].items()]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", help="batch sizes, in frames; default by device")
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        default=list(MODES),
        help="of TorchRL; with eager alone, ours is not compiled either",
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument(
        "--networks", choices=NETWORKS, default="same", help="TorchRL's layers: like ours, or its recipe's"
    )
    parser.add_argument("--repetitions", type=int, help="turns; default by size")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = vars(parser.parse_args())
    path = options.pop("json")
    result = run(**options)
    timing.show("Gradient step beside TorchRL", rows(result))
    provenance.save(path, provenance.document(NAME, result))


if __name__ == "__main__":
    main()
