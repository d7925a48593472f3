"""`python launch.py settings [KEY]`: list the settings with default, type, bounds and meaning. Torch-free."""

from __future__ import annotations

import json
import textwrap
from dataclasses import Field, dataclass
from operator import attrgetter
from typing import Any

from launcher.parser import command_parser
from launcher.setting_words import bounds_of, type_of, value_in_words
from shared.compose import compose, config_names, nearest_key, setting_keys
from shared.errors import SettingError
from shared.output import write_output
from shared.recipe_keys import replacement

DESCRIPTION = "List the settings of a run with their default, type, bounds and meaning."
INDENT = "    "
WIDTH = 80


@dataclass(frozen=True)
class SettingRow:
    """One setting as it is listed. `value` is that of the chosen config, or the default."""

    key: str
    value: Any
    field: Field[Any]

    def text(self) -> str:
        """Return the lines for a reader."""
        default = self.field.default
        changed = f" (default: {value_in_words(default)})" if self.value != default else ""
        facts = ", ".join(filter(None, [type_of(self.field), bounds_of(self.field), self.field.metadata["unit"]]))
        doc = textwrap.fill(self.field.metadata["doc"], WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
        return f"{self.key}={value_in_words(self.value)}{changed}\n{INDENT}[{facts}]\n{doc}\n"

    def facts(self) -> dict[str, Any]:
        """Return the same as plain values, for JSON."""
        metadata = {name: value for name, value in self.field.metadata.items() if name != "choices"}
        choices = list(self.field.metadata["choices"]) or None
        return {
            "key": self.key,
            "value": self.value,
            "default": self.field.default,
            "type": type_of(self.field),
            "choices": choices,
            **metadata,
        }


def main(arguments: list[str]) -> int:
    """Print the chosen settings and return 0. Raises: SettingError if the key or the config does not exist."""
    parser = command_parser("settings", DESCRIPTION, "optimization.compile --config quickstart")
    parser.add_argument("key", nargs="?", metavar="KEY", help="a setting, or a group such as env (default: all)")
    parser.add_argument("--config", metavar="NAME", help=f"show the values of this config: {', '.join(config_names())}")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    options = parser.parse_args(arguments)
    rows = _chosen_rows(options.key, options.config)
    if options.json:
        write_output(json.dumps([row.facts() for row in rows], indent=1) + "\n")
    else:
        write_output("\n".join(row.text() for row in rows))
    return 0


def _chosen_rows(chosen: str | None, config: str | None) -> list[SettingRow]:
    """Return the settings of a key or a group. Raises: SettingError if there is no such key, group or config."""
    settings = None if config is None else compose(config)
    rows = [
        SettingRow(key, field.default if settings is None else attrgetter(key)(settings), field)
        for key, field in setting_keys()
        if chosen is None or key == chosen or key.startswith(f"{chosen}.")
    ]
    if not rows:
        assert chosen is not None, "there are settings"
        raise _unknown(chosen)
    return rows


def _unknown(key: str) -> SettingError:
    """Return the error for a key that is neither a setting nor a group."""
    reason = replacement(key)
    if reason is not None:
        return SettingError(f"there is no setting {key}, {reason}")
    names = [name for name, _ in setting_keys()]
    groups = {name.rpartition(".")[0] for name in names}
    similar = nearest_key(key, [*names, *groups])
    fix = f"write {similar}" if similar else "leave it out to list all settings"
    return SettingError(
        f"there is no setting {key}; expected a setting, or a group: {', '.join(sorted(groups))}; {fix}"
    )
