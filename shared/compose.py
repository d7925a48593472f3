"""Compose the settings of a run from a config file and the command line, and explain every error in them.

`compose` reads `configs/<name>.yaml` over the defaults of `shared/config.py`, with Hydra. `load_settings` reads the
`config.yaml` of a run folder, which `save_settings` wrote. Each error becomes a SettingError that names the key. If
several settings are wrong, one SettingError lists them all.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError
from yaml import YAMLError

from shared.config import Settings
from shared.errors import SettingError, together
from shared.files import write_atomic
from shared.recipe_keys import RECIPE_DEFAULTS, RECIPE_VALUES, replacement
from shared.words import CUTOFF, nearest

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
EXAMPLE = "env.name=walker"
NUMBERS = "Any"  # the type of a setting that is a number or a list of numbers: OmegaConf has no such type
# Every version has saved these, from the first to the last line of the file. A file without them was damaged or cut.
ALWAYS_SAVED = ("env.backend", "env.name", "env.task", "networks.hidden_dim", "checkpoint.keep", "deadlines.stop_s")
_SAME_SPELLING = 0.85  # similarity of two keys that differ in a letter or two


def config_names(config_dir: Path = CONFIG_DIR) -> list[str]:
    """Return the names that a user can give to --config."""
    return sorted(path.stem for path in config_dir.glob("*.yaml"))


def compose(config_name: str, overrides: Sequence[str] = (), *, config_dir: Path = CONFIG_DIR) -> Settings:
    """Return the settings of a config, changed by `key=value` overrides. Types, keys and bounds are checked.

    config_name: a file of `config_dir`, or the path of a YAML file or of a run folder. A file has all settings, as the
    config.yaml of a run, or begins with `defaults: [settings, _self_]`, as the files of `configs/`.
    Raises: SettingError if the config, a key or a value is wrong.
    """
    if "/" in config_name or config_name.endswith((".yaml", ".yml")):
        return _compose_file(Path(config_name).expanduser(), overrides)
    _check_config_name(config_name, config_dir)
    _read_file(config_dir / f"{config_name}.yaml")
    kept = [override.input_line or "" for override in _parse_overrides(overrides)]
    ConfigStore.instance().store(name="settings", node=Settings)
    try:
        with initialize_config_dir(config_dir=str(config_dir.resolve()), version_base="1.3"):
            composed = hydra_compose(config_name=config_name, overrides=kept)
    except Exception as error:  # Hydra raises many kinds of errors for wrong entries of `defaults`
        raise _explain(error, f"config {config_name!r}") from error
    try:
        return _to_settings(composed)
    except OmegaConfBaseException as error:
        raise _explain(error, f"config {config_name!r}") from error


def _compose_file(path: Path, overrides: Sequence[str]) -> Settings:
    """Return the settings in a YAML file or in the config.yaml of a folder. Raises: SettingError."""
    file = path / "config.yaml" if path.is_dir() else path
    if "defaults" in _read_file(file):
        if file.suffix != ".yaml":
            raise SettingError(f"{path} has defaults; expected a name that ends in .yaml, as Hydra does; rename it")
        return compose(file.stem, overrides, config_dir=file.parent)
    return load_settings(file, overrides)


def load_settings(
    path: Path, overrides: Sequence[str] = (), *, on_missing: Callable[[str], None] = lambda line: None
) -> Settings:
    """Return the settings that `save_settings` wrote, changed by `key=value` overrides and checked as in `compose`.

    A setting that the file lacks, because the run was started before the setting existed, takes its default.
    on_missing: called once with a line that names all such settings, if there are any.
    Raises: SettingError if the file is missing, unreadable or cut, or if a key or a value is wrong.
    """
    raw, parsed = _read_file(path), _parse_overrides(overrides)
    missing = _missing_settings(raw, path)
    if missing:
        on_missing(f"{path} was written before these settings existed; they take their defaults: {', '.join(missing)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Settings), raw)
        assert isinstance(merged, DictConfig), type(merged)
        for override in parsed:
            OmegaConf.update(merged, override.key_or_group, override.value())
        return _to_settings(merged)
    except (HydraException, OmegaConfBaseException, OverflowError) as error:
        raise _explain(error, str(path)) from error


def _missing_settings(raw: DictConfig, path: Path) -> list[str]:
    """Return `key=default` of every setting that a config.yaml lacks. Raises: SettingError if it was cut."""
    found = set(_leaves(OmegaConf.to_container(raw, resolve=False)))
    lacking = [key for key in ALWAYS_SAVED if key not in found]
    if lacking:
        # A default in its place could be another task or another network than that of the checkpoint.
        raise SettingError(
            f"{path} lacks {', '.join(lacking)}; expected these settings, which launch.py always writes; restore the "
            "file from a copy, or add the settings with which the run was started (a file that only changes some "
            "settings begins with 'defaults: [settings, _self_]')"
        )
    return [f"{key}={_as_typed(entry.default)}" for key, entry in setting_keys() if key not in found]


def save_settings(settings: Settings, path: Path) -> None:
    """Write the settings as YAML with `write_atomic`."""
    write_atomic(path, settings_text(settings))


def settings_text(settings: Settings) -> str:
    """Return the settings as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(settings))


def setting_keys(node: Any = Settings, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Yield the dotted key and the dataclass field of every setting; sections are not settings."""
    for entry in fields(node):
        section = entry.default_factory
        if is_dataclass(section):
            yield from setting_keys(section, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", entry


def _to_settings(composed: DictConfig) -> Settings:
    """Return the composed settings as dataclasses. Raises: SettingError that lists every value out of its bounds."""
    settings = OmegaConf.to_object(composed)
    if not isinstance(settings, Settings):
        raise SettingError(
            "the config does not start from the typed settings; expected 'defaults: [settings, _self_]' in its first "
            "lines; add them"
        )
    wrong = []
    for key, entry in setting_keys():
        *sections, name = key.split(".")
        owner: Any = settings
        for section in sections:
            owner = getattr(owner, section)
        try:
            setattr(owner, name, _check_value(key, getattr(owner, name), entry))
        except SettingError as error:
            wrong.append(error)
    if wrong:
        raise together(wrong)
    return settings


def _check_value(key: str, value: Any, entry: Field[Any]) -> Any:
    """Return the value, a choice in the spelling of the choices. Raises: SettingError if the value is not allowed."""
    choices = entry.metadata["choices"]
    if choices:
        # YAML turns an unquoted `false` into a boolean, so compare the spellings.
        spelled = str(value).lower()
        spelled = RECIPE_VALUES.get(key, {}).get(spelled, spelled)
        if spelled not in choices:
            similar = nearest(spelled, choices)
            raise SettingError(
                f"{key}={value} is not allowed; expected one of {', '.join(choices)}; "
                + (f"set {key}={similar[0]}" if similar else f"set {key} to one of them")
            )
        return spelled
    is_list = entry.type == NUMBERS and isinstance(value, list | ListConfig) and len(value) > 0
    for number in value if is_list else [value]:
        if isinstance(number, int | float) and not isinstance(number, bool):
            _check_bounds(key, number, entry)
        elif entry.type == NUMBERS:
            raise SettingError(
                f"{key}={value} has a value of the wrong type; expected {_type_in_words(entry)}; write for example "
                f"{key}={_as_typed(entry.default)}. {_meaning(key, entry)}"
            )
    return value


def _check_bounds(key: str, value: float, entry: Field[Any]) -> None:
    lowest, highest = entry.metadata["minimum"], entry.metadata["maximum"]
    if (lowest is None or value >= lowest) and (highest is None or value <= highest) and _is_finite(value):
        return
    bounds = [f"at least {lowest}"] if lowest is not None else []
    bounds += [f"at most {highest}"] if highest is not None else []
    raise SettingError(
        f"{key}={value} is out of bounds; expected a finite number{', ' if bounds else ''}{' and '.join(bounds)}; "
        f"set for example {key}={_as_typed(entry.default)}, its default. {_meaning(key, entry)}"
    )


def _is_finite(value: float) -> bool:
    return isinstance(value, int) or math.isfinite(value)  # isfinite raises OverflowError for an integer above 1e308


def _check_config_name(name: str, config_dir: Path) -> None:
    names = config_names(config_dir)
    if name not in names:
        similar = nearest(name, names)
        raise SettingError(
            f"there is no config {name!r} in configs/; expected one of {', '.join(names)}; "
            + (
                f"use --config {similar[0]}"
                if similar
                else "use --config with one of them, or with a path such as ./{name}.yaml"
            )
        )


def _read_file(path: Path) -> DictConfig:
    """Return the content of a YAML file of settings.

    Raises: SettingError if it cannot be read, or if it has unknown keys, which are then all listed.
    """
    try:
        raw = OmegaConf.load(path)
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise SettingError(f"{path} cannot be read: {reason}; expected a YAML file of settings; correct it") from error
    if not isinstance(raw, DictConfig):
        raise SettingError(f"{path} holds a list; expected sections such as 'env:'; correct the file")
    names = OmegaConf.select(raw, "defaults")
    if names is not None and not isinstance(names, ListConfig):
        raise SettingError(
            f"{path} has defaults: {names}; expected a list; write 'defaults: [settings, _self_]' in its first lines"
        )
    wrong = []
    for key in _leaves(OmegaConf.to_container(raw, resolve=False)):
        try:
            if key != "defaults":
                _check_key(key, path.name)
        except SettingError as error:
            wrong.append(error)
    if wrong:
        raise together(wrong)
    return raw


def _leaves(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every value in nested dictionaries."""
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key != "defaults":
            yield from _leaves(value, f"{key}.")
        else:
            yield key


def _parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Return the overrides that change a setting. Raises: SettingError that lists everything that is wrong in them."""
    parser, blank = OverridesParser.create(), OmegaConf.structured(Settings)
    parsed, wrong = [], []
    for text in overrides:
        try:
            override = _parse_override(parser, text)
            if not _is_recipe_default(override):
                _check_override(override, text, blank)
                parsed.append(override)
        except SettingError as error:
            wrong.append(error)
    if wrong:
        raise together(wrong)
    return parsed


def _parse_override(parser: OverridesParser, text: str) -> Override:
    """Return the key and the value of an override. Raises: SettingError if it is not of the form key=value."""
    try:
        override = parser.parse_override(_quote_items(text))
        sweep = override.is_sweep_override()
    except (HydraException, ValueError) as error:
        raise SettingError(
            f"cannot read {text!r} as a setting; expected key=value, such as {EXAMPLE}; write key=value, and quote a "
            "value with blanks, commas or brackets: 'env.name=\"a b\"'"
        ) from error
    if not override.key_or_group:
        raise SettingError(f"{text!r} has no key; expected key=value; write for example {EXAMPLE}")
    if override.is_add() or override.is_delete() or override.is_force_add() or sweep:
        raise SettingError(
            f"{text!r} adds, deletes or sweeps; expected one value for an existing setting; write key=value, "
            f"such as {EXAMPLE}, and start one run for each value"
        )
    return override


def _quote_items(text: str) -> str:
    """Return an override with a list such as key=[physics=newton,env.decimation=4] as Hydra's grammar accepts it."""
    match = re.fullmatch(r"([\w.]+)=\[([^\[\]{}'\"]*=[^\[\]{}'\"]*)\]", text)
    if match is None:
        return text
    return f"{match[1]}=[{','.join(json.dumps(item.strip()) for item in match[2].split(','))}]"


def _is_recipe_default(override: Override) -> bool:
    """Return whether an override gives a key of TorchRL's recipe, unknown here, the value that is always used here."""
    value = RECIPE_DEFAULTS.get(override.key_or_group)
    return value is not None and _as_typed(override.value()).lower() == value


def _check_override(override: Override, text: str, blank: DictConfig) -> None:
    """Check the key, and the value as far as this is possible without the other settings. Raises: SettingError."""
    key = override.key_or_group
    _check_key(key, text)
    try:
        OmegaConf.update(blank, key, override.value())
        section, _, name = key.rpartition(".")
        if not OmegaConf.is_interpolation(OmegaConf.select(blank, section), name):
            _check_value(key, OmegaConf.select(blank, key), dict(setting_keys())[key])
    except (HydraException, OmegaConfBaseException, OverflowError) as error:
        raise _explain(error, text) from error


def _check_key(key: str, origin: str) -> None:
    """Check that a key is a setting. `origin` is the override or the file that has it. Raises: SettingError."""
    known = dict(setting_keys())
    if key in known:
        return
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        raise SettingError(
            f"{key} is a section of settings (in {origin}); expected one of the keys in it; write for example "
            f"{inside[0]}=VALUE"
        )
    reason = replacement(key)
    if reason is not None:
        raise SettingError(f"there is no setting {key} (in {origin}), {reason}")
    similar = nearest_key(key, known)
    if similar is None:
        fix = "remove it, or look for the key in docs/settings.md"
    else:
        fix = f"write {similar}=VALUE or remove it. {_meaning(similar, known[similar])}"
    raise SettingError(f"there is no setting {key} (in {origin}); expected a key of shared/config.py; {fix}")


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """Return the setting that the user probably means, or None if none is near.

    It is a key that is spelled almost the same; otherwise one with the same name in another section; otherwise one with
    the name as a part, such as world_model_lr for lr; otherwise a similar one.
    """
    names = list(known)
    last = key.split(".")[-1]
    same_name = [name for name in names if name.split(".")[-1] == last]
    name_as_part = [name for name in names if last in name.split(".")[-1].split("_")]
    for candidates, cutoff in ((names, _SAME_SPELLING), (same_name, 0.0), (name_as_part, 0.0), (names, CUTOFF)):
        similar = nearest(key, candidates, cutoff=cutoff)
        if similar:
            return similar[0]
    return None


def _explain(error: Exception, origin: str) -> SettingError:
    """Return a SettingError for an error of Hydra or OmegaConf. The innermost cause knows the key and the value."""
    inner: BaseException = error
    while (below := inner.__cause__ or inner.__context__) is not None and not getattr(inner, "full_key", None):
        inner = below
    key = str(getattr(inner, "full_key", "") or "")
    entry = dict(setting_keys()).get(key)
    reason = next((line for line in str(inner).splitlines() if line.strip()), type(inner).__name__)
    if entry is None:
        return SettingError(
            f"{origin} cannot be composed: {reason}; expected settings of shared/config.py; correct {origin}"
        )
    if not isinstance(inner, ValidationError):
        return SettingError(
            f"{key} cannot be set: {reason}; expected {_type_in_words(entry)}, or the key of another setting in "
            f"${{...}}; correct {origin}. {_meaning(key, entry)}"
        )
    return SettingError(
        f"{key} has a value of the wrong type: {reason}; expected {_type_in_words(entry)}; write for example "
        f"{key}={_as_typed(entry.default)}. {_meaning(key, entry)}"
    )


def _type_in_words(entry: Field[Any]) -> str:
    kind = str(entry.type).removeprefix("Optional[").removesuffix("]")
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}
    names["list[str]"] = "a list of words, such as [a,b]"
    names[NUMBERS] = "a number, or a list of numbers such as [1,0.5]"
    return names[kind] + (" or null" if str(entry.type).startswith("Optional[") else "")


def _as_typed(value: object) -> str:
    """Return a value as a user types it on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _meaning(key: str, entry: Field[Any]) -> str:
    return f"Meaning of {key}: {entry.metadata['doc']}"
