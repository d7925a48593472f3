"""Settings from files and command lines: Hydra composes, this file checks and explains.

`compose` reads `configs/<name>.yaml` over the dataclasses of `shared/config.py`; `load_settings` reads the resolved
`config.yaml` of a run folder. Whatever is wrong ends as one SettingError that names the keys, never as a stack trace.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from shared.config import Settings
from shared.errors import SettingError, together
from shared.recipe_keys import RECIPE_DEFAULTS, RECIPE_VALUES, replacement

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
EXAMPLE = "env.name=walker"


def config_names(config_dir: Path = CONFIG_DIR) -> list[str]:
    """Names a user can give to --config."""
    return sorted(path.stem for path in config_dir.glob("*.yaml"))


def compose(config_name: str, overrides: Sequence[str] = (), *, config_dir: Path = CONFIG_DIR) -> Settings:
    """The settings of one named config with `key=value` overrides on top, types, keys and bounds checked.

    Raises: SettingError naming the config, key or value that is wrong and the nearest valid one.
    """
    _check_config_name(config_name, config_dir)
    _check_file(config_dir / f"{config_name}.yaml")
    kept = [override.input_line or "" for override in _parse(overrides)]
    ConfigStore.instance().store(name="settings", node=Settings)
    try:
        with initialize_config_dir(config_dir=str(config_dir.resolve()), version_base="1.3"):
            composed = hydra_compose(config_name=config_name, overrides=kept)
        return _finish(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, f"config {config_name!r}") from error


def load_settings(path: Path, overrides: Sequence[str] = ()) -> Settings:
    """The settings saved by `save_settings`, with `key=value` overrides on top, checked as in `compose`.

    Raises: SettingError if the file is missing, unreadable or does not fit this version's settings.
    """
    raw, parsed = _check_file(path), _parse(overrides)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Settings), raw)
        assert isinstance(merged, DictConfig), type(merged)
        for override in parsed:
            OmegaConf.update(merged, override.key_or_group, override.value())
        return _finish(merged)
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, str(path)) from error


def save_settings(settings: Settings, path: Path) -> None:
    """Write the resolved settings as YAML, at once or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(OmegaConf.to_yaml(OmegaConf.structured(settings)))
    os.replace(partial, path)


def setting_keys(node: Any = Settings, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """(dotted key, field) of every setting that holds a value."""
    for entry in fields(node):
        section = entry.default_factory
        if is_dataclass(section):
            yield from setting_keys(section, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", entry


def _finish(composed: DictConfig) -> Settings:
    settings = OmegaConf.to_object(composed)
    if not isinstance(settings, Settings):
        raise SettingError(
            "the config does not build on the typed settings; its first lines must be 'defaults: [settings, _self_]'; "
            "add them"
        )
    wrong = []
    for key, entry in setting_keys():
        *sections, name = key.split(".")
        owner: Any = settings
        for section in sections:
            owner = getattr(owner, section)
        try:
            setattr(owner, name, _checked(key, getattr(owner, name), entry))
        except SettingError as error:
            wrong.append(error)
    if wrong:
        raise together(wrong)
    return settings


def _checked(key: str, value: Any, entry: Field[Any]) -> Any:
    """The value, a choice in the spelling of its choices. Raises: SettingError if it is none or out of bounds."""
    choices = entry.metadata["choices"]
    if choices:
        # YAML turns an unquoted `false` into a boolean before it reaches a choice between words.
        spelled = str(value).lower()
        spelled = RECIPE_VALUES.get(key, {}).get(spelled, spelled)
        if spelled not in choices:
            nearest = _nearest(spelled, choices) or entry.default
            raise SettingError(
                f"{key}={value} is none of its choices; wanted one of {', '.join(choices)}; set {key}={nearest}"
            )
        return spelled
    if isinstance(value, int | float) and not isinstance(value, bool):
        _check_bounds(key, value, entry)
    return value


def _check_bounds(key: str, value: float, entry: Field[Any]) -> None:
    lowest, highest = entry.metadata["minimum"], entry.metadata["maximum"]
    above = lowest is None or value >= lowest
    below = highest is None or value <= highest
    if above and below and math.isfinite(value):
        return
    wanted = " and ".join(
        part
        for part in (
            f"at least {lowest}" if lowest is not None else "",
            f"at most {highest}" if highest is not None else "",
        )
        if part
    )
    raise SettingError(
        f"{key}={value} is out of bounds ({entry.metadata['doc']}); wanted a finite number"
        f"{', ' + wanted if wanted else ''}; its default is {key}={_text(entry.default)}"
    )


def _check_config_name(name: str, config_dir: Path) -> None:
    names = config_names(config_dir)
    if name not in names:
        nearest = _nearest(name, names) or names[0]
        raise SettingError(
            f"there is no config {name!r} in configs/; wanted one of {', '.join(names)}; use --config {nearest}"
        )


def _check_file(path: Path) -> DictConfig:
    try:
        raw = OmegaConf.load(path)
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise SettingError(f"{path} cannot be read: {reason}; wanted a YAML file of settings; mend the file") from error
    if not isinstance(raw, DictConfig):
        raise SettingError(f"{path} holds {type(raw).__name__}; wanted sections such as 'env:'; mend the file")
    wrong = []
    for key in _leaves(OmegaConf.to_container(raw, resolve=False)):
        try:
            if key != "defaults":
                _check_key(key, f"{key} in {path.name}")
        except SettingError as error:
            wrong.append(error)
    if wrong:
        raise together(wrong)
    return raw


def _leaves(node: Any, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key != "defaults":
            yield from _leaves(value, f"{key}.")
        else:
            yield key


def _parse(overrides: Sequence[str]) -> list[Override]:
    """The overrides that change a setting. Raises: SettingError with all that is wrong in each of them."""
    parser, blank = OverridesParser.create(), OmegaConf.structured(Settings)
    parsed, wrong = [], []
    for text in overrides:
        try:
            override = _read(parser, text)
            if not _asks_for_nothing(override):
                _check_override(override, text, blank)
                parsed.append(override)
        except SettingError as error:
            wrong.append(error)
    if wrong:
        raise together(wrong)
    return parsed


def _read(parser: OverridesParser, text: str) -> Override:
    try:
        override = parser.parse_override(text)
        sweep = override.is_sweep_override()
    except (HydraException, ValueError) as error:
        raise SettingError(
            f"cannot read {text!r} as a setting; wanted key=value, such as {EXAMPLE}; write key=value, and quote values "
            "with blanks, commas or brackets: 'env.name=\"a b\"'"
        ) from error
    if not override.key_or_group:
        raise SettingError(f"{text!r} has no key; wanted key=value; such as {EXAMPLE}")
    if override.is_add() or override.is_delete() or override.is_force_add() or sweep:
        raise SettingError(
            f"{text!r} adds, deletes or sweeps; one run has one value for each setting; write key=value, "
            f"such as {EXAMPLE}"
        )
    return override


def _asks_for_nothing(override: Override) -> bool:
    """A key of the recipe that does not exist here, with a value that says what is so here anyway."""
    wanted = RECIPE_DEFAULTS.get(override.key_or_group)
    return wanted is not None and _text(override.value()).lower() == wanted


def _check_override(override: Override, text: str, blank: DictConfig) -> None:
    """Raises: SettingError if its key, or its value as far as it can be told by itself, cannot work."""
    key = override.key_or_group
    _check_key(key, text)
    try:
        OmegaConf.update(blank, key, override.value())
        section, _, name = key.rpartition(".")
        if not OmegaConf.is_interpolation(OmegaConf.select(blank, section), name):
            _checked(key, OmegaConf.select(blank, key), dict(setting_keys())[key])
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, text) from error


def _check_key(key: str, met: str) -> None:
    known = {name: entry.metadata["doc"] for name, entry in setting_keys()}
    if key in known:
        return
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        raise SettingError(f"{key} is a section of settings (met {met}); wanted one key in it; such as {inside[0]}")
    reason = replacement(key)
    if reason is not None:
        raise SettingError(f"there is no setting {key} (met {met}), {reason}")
    nearest = _nearest_key(key, known)
    raise SettingError(
        f"there is no setting {key} (met {met}); the nearest is {nearest} ({known[nearest]}); write {nearest}=VALUE "
        f"or leave it out"
    )


def _nearest_key(key: str, known: Iterable[str]) -> str:
    names = list(known)
    last = key.split(".")[-1]
    by_name = [name for name in names if name.split(".")[-1] == last]
    by_word = [name for name in names if last in name.split(".")[-1].split("_")]  # lr: world_model_lr
    found = _nearest(key, names, cutoff=0.85) or _nearest(key, by_name) or _nearest(key, by_word)
    found = found or _nearest(key, names)
    return found or names[0]


def _nearest(word: str, words: Iterable[str], cutoff: float = 0.0) -> str | None:
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)
    return found[0] if found else None


def _explain(error: Exception, origin: str) -> SettingError:
    """Hydra wraps OmegaConf's errors; the innermost one knows the key and the value."""
    inner: BaseException = error
    while (below := inner.__cause__ or inner.__context__) is not None and not getattr(inner, "full_key", None):
        inner = below
    key = str(getattr(inner, "full_key", "") or "")
    entry = dict(setting_keys()).get(key)
    reason = next((line for line in str(inner).splitlines() if line.strip()), type(inner).__name__)
    if entry is None:
        return SettingError(f"{origin} does not compose: {reason}; wanted settings of shared/config.py; mend that line")
    return SettingError(
        f"{key} has a value of the wrong kind: {reason}; wanted {_kind(entry)} ({entry.metadata['doc']}); "
        f"for example {key}={_text(entry.default)}"
    )


def _kind(entry: Field[Any]) -> str:
    kind = str(entry.type).removeprefix("Optional[").removesuffix("]")
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}
    names["list[str]"] = "a list of words, such as [a,b]"
    return names[kind] + (" or null" if str(entry.type).startswith("Optional[") else "")


def _text(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
