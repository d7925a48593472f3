"""Each setting explains itself in a line that fits a table and an error message."""

from __future__ import annotations

from shared.compose import setting_keys

LONGEST_DOC = 140


def test_every_setting_has_one_short_line_that_explains_it() -> None:
    for key, entry in setting_keys():
        doc = entry.metadata["doc"]
        assert 0 < len(doc) <= LONGEST_DOC and "\n" not in doc and doc.endswith("."), key


def test_every_default_is_one_of_its_choices_and_within_its_bounds() -> None:
    for key, entry in setting_keys():
        default, metadata = entry.default, entry.metadata
        assert not metadata["choices"] or default in metadata["choices"], key
        if isinstance(default, int | float):
            low, high = metadata["minimum"], metadata["maximum"]
            assert (low is None or low <= default) and (high is None or default <= high), key


def test_every_whole_number_has_a_maximum() -> None:
    for key, entry in setting_keys():
        kind = str(entry.type).removeprefix("Optional[").removesuffix("]")
        assert kind != "int" or entry.metadata["maximum"] is not None, key


def test_a_time_or_a_memory_size_has_its_unit() -> None:
    units = {"_s": "s", "_gb": "GB"}
    for key, entry in setting_keys():
        for suffix, unit in units.items():
            assert not key.endswith(suffix) or entry.metadata["unit"] == unit, key
