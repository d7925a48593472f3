"""The sets of settings that `benchmarks.options` compares."""

import pytest

pytest.importorskip("matplotlib")

from benchmarks.options import SETS


def test_all_sets_differ_and_a_combined_set_contains_both_of_its_parts() -> None:
    sets = {name: tuple(sorted(settings.items())) for name, settings in SETS.items()}
    assert len(set(sets.values())) == len(sets), sets
    both = SETS["all"]
    assert both["optimization.slow_critic_decay"] == SETS["slow"]["optimization.slow_critic_decay"] != "null"
    assert both["optimization.return_norm"] == SETS["norm"]["optimization.return_norm"] == "percentile"
