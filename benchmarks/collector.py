"""How fast the simulator is with the policy and with the stream, compared with the bare simulator.

    python -m benchmarks.collector [--json PATH] [--quick] [--device cuda:0] [--threads 1] [--cases pendulum cheetah]

Three loops take turns on the same settings: the simulator alone under random actions; the simulator with the acting
policy; and the real collector process, which streams into the ring of a stand-in for the learner. The stand-in grants
at once and never trains. `python -m benchmarks.collector --scaling` repeats this for 64 to 16,384 environments.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.pair import LearnerEnd, pair_settings, per_chunk
from benchmarks.provenance import document, save
from benchmarks.timing import row, show, spread
from collector_proc.acting_policy import ActingPolicy
from collector_proc.simulators.base import Arrival, Simulator
from collector_proc.simulators.registry import build_simulator
from shared.config import Settings

FULL_NETWORKS = ("networks.state_dim=30", "networks.rssm_hidden_dim=200", "networks.hidden_dim=400")
SCALES = (64, 256, 1024, 4096, 16_384)


@dataclass(frozen=True)
class Case:
    """A simulator and its networks, with `ticks` per chunk and `seconds` per turn of a loop."""

    config: str
    overrides: tuple[str, ...]
    envs: int
    ticks: int = 16
    seconds: float = 2.0
    missing: str = ""  # the reason why this machine cannot run it


def cases(device: str) -> dict[str, Case]:
    """Return every case; `missing` of a case names what this machine lacks for it."""
    full = 4096 if device.startswith("cuda") else 256
    return {
        "pendulum": Case("quickstart", ("env.num_envs=4096", "collector.eval_envs=16"), 4096),
        "pendulum, full networks": Case(  # a CPU core needs 0.25 s for one tick of 4,096
            "quickstart", (f"env.num_envs={full}", *FULL_NETWORKS), full
        ),
        "cheetah": Case(
            "quickstart_dmc",
            ("env.name=cheetah", "env.task=run", "collector.num_collectors=2", "env.n_parallel_envs=4"),
            8,
            ticks=25,
        ),
        "mjlab Go1": Case("mjlab", (), 4096, missing=_without_mjlab(device)),
    }


def _without_mjlab(device: str) -> str:
    if importlib.util.find_spec("mjlab") is None:
        return "mjlab is not installed"
    return "" if device.startswith("cuda") else "thousands of robots need a GPU"


class Loops:
    """The simulator and the policy in this process, for the two loops that do not stream."""

    def __init__(self, settings: Settings, *, device: str) -> None:
        self.simulator: Simulator = build_simulator(settings, seed=settings.env.seed, device=device)
        self.device = torch.device(device)
        self.acting = ActingPolicy(
            self.simulator.spec, settings.networks, settings.collector, device=self.device, seed=0, random_ticks=0
        )
        self.arrival: Arrival = self.simulator.reset()
        self.shape = (self.simulator.spec.num_envs, self.simulator.spec.action_dim)
        self.action = torch.zeros(self.shape, device=self.device)

    def bare(self) -> None:
        """Do one tick under random actions."""
        self.simulator.step(torch.rand(self.shape, device=self.simulator.device) * 2 - 1)

    def policy(self) -> None:
        """Do one tick under the policy."""
        first = self.arrival.is_first.to(self.device)
        action = torch.where(first[:, None], 0.0, self.action)
        self.action = self.acting.act(self.arrival, action, version=1)
        self.arrival = self.simulator.step(self.action.to(self.simulator.device))

    def pace(self, loop: str, seconds: float) -> dict[str, float]:
        """Run one of the loops; return its ticks per second and this process's CPU milliseconds per tick."""
        step, ticks = getattr(self, loop), 0
        self._synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - wall < seconds or ticks < 3:
            step()
            ticks += 1
        self._synchronize()
        passed = time.perf_counter() - wall
        return {"ticks_per_s": ticks / passed, "cpu_ms_per_tick": (time.process_time() - cpu) / ticks * 1e3}

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(case: Case, *, device: str, repetitions: int, seconds: float) -> dict[str, Any]:
    """Run all three loops in turn and return ticks/s, the share of the bare pace in each turn, and CPU time."""
    settings = pair_settings(case.config, list(case.overrides), envs=case.envs, ticks=case.ticks)
    turns: dict[str, list[dict[str, float]]] = {"bare": [], "policy": [], "stream": []}
    loops = Loops(settings, device=device)
    try:
        with LearnerEnd(settings, device=device) as end:
            pace = end.run_chunks(2)
            for loop in ("bare", "policy"):
                loops.pace(loop, 0.2)
            chunks = max(3, round(seconds * pace["chunks"] / pace["wall_s"]))
            for _ in range(repetitions):
                for loop in ("bare", "policy"):
                    turns[loop].append(loops.pace(loop, seconds))
                figures = end.run_chunks(chunks)
                turns["stream"].append(_per_tick(figures, case.ticks))
    finally:
        loops.simulator.close()
    result: dict[str, Any] = {"num_envs": case.envs, "ticks_per_chunk": case.ticks, "repetitions": repetitions}
    for loop, figures in turns.items():
        result[loop] = {key: spread([turn[key] for turn in figures]) for key in figures[0]}
    for loop in ("policy", "stream"):
        pairs = zip(turns[loop], turns["bare"], strict=True)
        result[loop]["share_of_bare"] = spread([own["ticks_per_s"] / bare["ticks_per_s"] for own, bare in pairs])
    pairs = zip(turns["stream"], turns["policy"], strict=True)
    result["stream"]["share_of_policy"] = spread([own["ticks_per_s"] / act["ticks_per_s"] for own, act in pairs])
    result["fps"] = round(result["stream"]["ticks_per_s"]["median"] * case.envs)
    return result


def _per_tick(figures: dict[str, float], ticks: int) -> dict[str, float]:
    chunk = per_chunk(figures)
    return {
        "ticks_per_s": ticks * figures["chunks"] / figures["wall_s"],
        "cpu_ms_per_tick": chunk["collector_cpu_ms"] / ticks,
        "learner_cpu_ms_per_chunk": chunk["learner_cpu_ms"],
        "collector_gib": figures["collector_gib"],
    }


def run(
    *, quick: bool = False, device: str = "cpu", names: tuple[str, ...] = (), scaling: bool = True
) -> dict[str, Any]:
    """Measure every case that this machine can run, or the cases in `names`, and report those left out.

    `scaling` adds the pendulum over the number of environments.
    """
    repetitions, seconds = (1, 0.2) if quick else (3, 2.0)
    found, left_out, lines = {}, {}, []
    for name, case in cases(device).items():
        if (names and name not in names) or (quick and name != "pendulum"):
            continue
        if case.missing:
            left_out[name] = case.missing
            continue
        chosen = Case("quickstart", ("env.num_envs=64",), 64) if quick else case
        found[name] = measure(chosen, device=device, repetitions=repetitions, seconds=seconds)
        lines += _rows(name, found[name])
    scales = {}
    for envs in () if quick or not scaling else SCALES:
        case = Case("quickstart", (f"env.num_envs={envs}",), envs)
        scales[str(envs)] = measure(case, device=device, repetitions=1, seconds=seconds)
        lines.append(
            row(
                f"collector, pendulum, {envs:,} envs, with policy and stream", scales[str(envs)]["fps"], "agent steps/s"
            )
        )
    result = {"device": device, "threads": torch.get_num_threads(), "cases": found, "scaling": scales}
    return result | {"left_out": left_out, "rows": lines}


def _rows(name: str, figures: dict[str, Any]) -> list[dict[str, Any]]:
    bare, label = figures["bare"]["ticks_per_s"]["median"], f"{name}, {figures['num_envs']:,} envs"
    lines = []
    for loop, words in (("policy", "with policy"), ("stream", "with policy and stream")):
        ticks, share = figures[loop]["ticks_per_s"]["median"], figures[loop]["share_of_bare"]["median"]
        lines.append(row(f"{label}, {words}, against bare", ticks, "ticks/s", peer=bare, times=share))
    share = figures["stream"]["share_of_policy"]["median"]
    policy = figures["policy"]["ticks_per_s"]["median"]
    ticks = figures["stream"]["ticks_per_s"]["median"]
    return [*lines, row(f"{label}, stream against policy alone", ticks, "ticks/s", peer=policy, times=share)]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that it runs")
    parser.add_argument("--device", default="cpu", help="device of simulator, policy and ring")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each process")
    parser.add_argument("--cases", nargs="+", default=(), help="names of cases; default: all")
    parser.add_argument("--scaling", action="store_true", help="pendulum over the number of environments as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = run(quick=options.quick, device=options.device, names=tuple(options.cases), scaling=options.scaling)
    save(options.json, document("collector", result))
    show("collector", result["rows"])
    for what, why in result["left_out"].items():
        print(f"left out: {what}: {why}")


if __name__ == "__main__":
    main()
