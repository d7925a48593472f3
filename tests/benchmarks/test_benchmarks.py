"""Every benchmark runs at tiny sizes and writes figures with their provenance. No test checks a speed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as together
from benchmarks import collector, end_to_end, replay, timing, transport
from benchmarks.pair import LearnerEnd, pair_settings
from benchmarks.provenance import command_line, document, save
from shared.compose import compose
from shared.geometry import Geometry, check_settings

REPO = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_positive_rows(result: dict[str, Any], at_least: int) -> None:
    assert len(result["rows"]) >= at_least
    for row in result["rows"]:
        assert set(row) == {"name", "value", "unit", "peer", "ratio", "bar"}
        assert row["value"] > 0, row
        assert all(row[key] is None or row[key] > 0 for key in ("peer", "ratio")), row


def test_the_replay_and_torchrls_buffer_are_measured_on_the_same_rows():
    result = replay.run(quick=True)
    assert_positive_rows(result, 4)
    assert result["bytes_per_row"] == 4 * (48 + 12 + 1) + 3
    assert {figures["frames"] for figures in (result["sample"]["100"][name] for name in replay.SAMPLERS)} == {100}


def test_every_way_of_moving_chunks_delivers_each_chunk_once_and_in_order():
    figures = transport.run(quick=True, only=("chunks",))  # the receiver checks the number in each chunk
    tiny = figures["chunks"]["tiny"]
    assert set(transport.KINDS) <= set(tiny)
    assert all(tiny[kind]["chunks_per_s"]["median"] > 0 for kind in transport.KINDS)
    assert_positive_rows(figures, 8)


def test_the_latencies_of_weights_and_commits_are_positive():
    latency = transport.run(quick=True, only=("latency",))["latency"]["idle learner"]
    for way in ("push", "commit"):
        assert latency[way]["count"] > 0
        assert 0 < latency[way]["median_ms"] <= latency[way]["p99_ms"] <= latency[way]["max_ms"]


def test_the_collector_is_measured_bare_with_policy_and_with_stream():
    result = collector.run(quick=True)
    assert_positive_rows(result, 3)
    figures = result["cases"]["pendulum"]
    assert all(figures[loop]["ticks_per_s"]["min"] > 0 for loop in ("bare", "policy", "stream")) and figures["fps"] > 0


def test_a_real_run_is_measured_with_both_sides_and_with_each_side_paused():
    figures = end_to_end.run(quick=True)["presets"]["quickstart"]
    assert figures["learner"]["frames_per_s"]["median"] == 0, "a stopped collector commits nothing"
    assert figures["collector"]["steps_per_s"]["median"] == 0, "a paused learner makes no gradient step"
    steps = [figures[phase]["steps_per_s"]["median"] for phase in ("both", "learner")]
    frames = [figures[phase]["frames_per_s"]["median"] for phase in ("both", "collector")]
    if min(steps + frames) == 0:
        pytest.skip(f"pace not reached: {steps} gradient steps/s and {frames} agent steps/s in turns of one second")


def test_a_run_that_never_trains_is_ended_with_all_its_processes(monkeypatch):
    monkeypatch.setattr(end_to_end, "START_S", 0.0)
    run = end_to_end.Run([*end_to_end.PRESETS["quickstart"], *end_to_end.FREE], None)
    with pytest.raises(RuntimeError, match="20 gradient steps"), run:
        pytest.fail("entered a run without a gradient step")
    assert run._launch.returncode is not None and not run.run_dir.parent.exists()


def test_a_collector_that_cannot_start_ends_the_measurement_with_its_output():
    settings = pair_settings("quickstart", ["env.num_envs=8"], envs=8, ticks=4)
    end = LearnerEnd(settings, module="benchmarks.nowhere")
    with pytest.raises(RuntimeError, match="No module named"), end:
        pytest.fail("entered without a collector")
    assert end._child.returncode is not None and not end.run_dir.exists()


@pytest.mark.parametrize("preset", end_to_end.PRESETS)
def test_every_preset_of_the_end_to_end_benchmark_passes_the_checks_of_a_run(preset):
    _, config, *overrides = end_to_end.PRESETS[preset]
    settings = compose(config, [*overrides, *end_to_end.FREE])
    check_settings(settings)
    assert settings.optimization.replay_ratio is None, "neither side waits for the other"


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_every_collector_case_has_a_ring_of_eight_chunks(device):
    for name, case in collector.cases(device).items():
        settings = pair_settings(case.config, list(case.overrides), envs=case.envs, ticks=case.ticks)
        sizes = Geometry.of(settings)
        assert (sizes.num_envs, sizes.ticks_per_chunk, sizes.capacity) == (case.envs, case.ticks, 8 * case.ticks), name


def test_a_result_file_has_four_sections_and_no_absolute_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--json", str(tmp_path / "out.json"), "--quick"])
    save(tmp_path / "kept" / "out.json", document("replay", {"rows": [timing.row("a", 1.0, "ms")]}))
    text = (tmp_path / "kept" / "out.json").read_text()
    content = json.loads(text)
    assert set(content) == {"run", "versions", "hardware", "runtime"}
    assert content["run"]["command"] == "python -m benchmarks.replay --json out.json --quick"
    assert {"commit", "dirty"} == set(content["run"]["git"]) and content["versions"]["torch"]
    assert content["hardware"]["cores"] >= 1 and str(tmp_path) not in text
    assert command_line(["--json", "/a/b/c.json"]) == "--json c.json"


def test_cases_take_turns_and_a_ratio_compares_the_same_turn():
    order: list[str] = []

    def case(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    samples = timing.interleave({"a": case("a"), "b": case("b")}, repetitions=2, warmup=1)
    assert order == ["a", "b"] * 3 and len(samples["a"].wall) == 2
    ours, peer = timing.Samples(), timing.Samples()
    ours.cpu, peer.cpu = [1.0, 10.0, 2.0], [2.0, 30.0, 8.0]
    assert timing.ratio(ours, peer) == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert timing.percentile([float(n) for n in range(1, 101)], 0.99) == 99.0
    assert timing.percentile([5.0], 0.99) == 5.0


def test_the_command_reports_what_it_left_out_and_what_failed(monkeypatch, tmp_path, capsys):
    def broken(**options: Any) -> dict[str, Any]:
        raise RuntimeError("a broken benchmark")

    def fine(**options: Any) -> dict[str, Any]:
        return {"rows": [timing.row("figure", 2.0, "ms")], "left_out": {"half": "no room"}}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(replay, "run", fine)
    monkeypatch.setattr(transport, "run", broken)
    out = tmp_path / "all.json"
    monkeypatch.setattr(sys, "argv", ["x", "--quick", "--only", "replay", "transport", "--json", str(out)])
    assert together.main() == 1
    output = capsys.readouterr().out
    assert (
        "left out: replay: half: no room" in output and "FAILED: transport: RuntimeError: a broken benchmark" in output
    )
    assert "left out: every figure of a GPU: no CUDA device" in output
    runtime = json.loads(out.read_text())["runtime"]
    assert list(runtime["benchmarks"]) == ["replay"] and runtime["rows"][0]["name"] == "replay: figure"


def test_the_command_prints_one_table(tmp_path):
    out = tmp_path / "all.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "replay", "--json", str(out)]
    answer = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("Tandem's benchmarks") == 1
    assert set(json.loads(out.read_text())) == {"run", "versions", "hardware", "runtime"}
