"""A suggestion is made only if it is near what the user wrote."""

from __future__ import annotations

from shared.words import MAX_SUGGESTIONS, nearest

TASKS = ["walk", "run", "stand", "swingup", "balance"]


def test_a_misspelled_word_gets_the_word_that_was_meant() -> None:
    assert nearest("stannd", TASKS) == ["stand"]


def test_the_most_similar_word_comes_first() -> None:
    assert nearest("cheetah-rum", ["cheetah-walk", "cheetah-run"])[0] == "cheetah-run"


def test_nothing_is_suggested_for_a_word_that_resembles_none() -> None:
    assert nearest("xyzzy", TASKS) == []
    assert nearest("", TASKS) == [] and nearest("walk", []) == []


def test_the_cutoff_decides_how_similar_a_suggestion_must_be() -> None:
    assert nearest("walker", ["walk"], cutoff=0.7) == ["walk"]
    assert nearest("walker", ["walk"], cutoff=0.9) == []


def test_the_number_of_suggestions_is_limited() -> None:
    assert len(nearest("task", [f"task{n}" for n in range(50)])) == MAX_SUGGESTIONS
