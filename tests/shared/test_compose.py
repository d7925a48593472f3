"""Settings are composed from defaults, a config and overrides, and every error in them is explained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shared.compose import compose, config_names, load_settings, save_settings, setting_keys
from shared.config import Settings
from shared.errors import SettingError
from shared.geometry import check_settings
from shared.recipe_keys import OTHER_WORDS, RECIPE_DEFAULTS, RECIPE_KEYS


def test_the_default_config_is_the_dataclass_defaults() -> None:
    assert compose("dm_control") == Settings()


@pytest.mark.parametrize("name", config_names())
def test_every_config_composes_and_its_settings_fit_each_other(name: str) -> None:
    settings = compose(name)
    check_settings(settings)


def test_isaaclab_has_the_numbers_that_its_documentation_states() -> None:
    settings = compose("isaaclab")
    replay, collector = settings.replay_buffer, settings.collector
    assert (settings.env.num_envs, collector.frames_per_batch, collector.init_random_frames) == (4096, 204_800, 204_800)
    assert (replay.batch_size, replay.batch_length, replay.gpu_storage) == (12_800, 50, None)
    assert settings.networks.continue_head and not settings.env.from_pixels


def test_overrides_change_the_settings_of_the_config() -> None:
    settings = compose(
        "dm_control",
        ["env.name=walker", "env.task=walk", "optimization.autocast=false", "optimization.replay_ratio=null"],
    )
    assert (settings.env.name, settings.env.task) == ("walker", "walk")
    assert settings.optimization.autocast == "false"
    assert settings.optimization.replay_ratio is None


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("[physics=newton_mjwarp]", ["physics=newton_mjwarp"]),
        ("[physics=newton_mjwarp, env.decimation=4]", ["physics=newton_mjwarp", "env.decimation=4"]),
        ('["physics=newton_mjwarp","env.decimation=4"]', ["physics=newton_mjwarp", "env.decimation=4"]),
        ("['presets=rgb,newton']", ["presets=rgb,newton"]),
        ("[]", []),
    ],
)
def test_items_of_a_list_may_hold_equals_signs_with_or_without_quotes(
    text: str, items: list[str], tmp_path: Path
) -> None:
    settings = compose("isaaclab", [f"env.isaac_overrides={text}"])
    assert settings.env.isaac_overrides == items
    save_settings(settings, tmp_path / "config.yaml")
    assert load_settings(tmp_path / "config.yaml") == settings


@pytest.mark.parametrize("spelling", ["false", "False", '"false"'])
def test_a_choice_may_be_a_word_that_yaml_reads_as_a_boolean(spelling: str) -> None:
    assert compose("dm_control", [f"optimization.autocast={spelling}"]).optimization.autocast == "false"


@pytest.mark.parametrize("spelling", ["true", "True", '"true"'])
def test_autocast_true_means_bfloat16_as_in_torchrls_recipe(spelling: str, tmp_path: Path) -> None:
    settings = compose("quickstart", [f"optimization.autocast={spelling}"])
    assert settings.optimization.autocast == "bfloat16"
    text = f"defaults: [settings, _self_]\noptimization:\n  autocast: {spelling}\n"
    (tmp_path / "mine.yaml").write_text(text)
    assert compose("mine", config_dir=tmp_path).optimization.autocast == "bfloat16"


def test_a_number_gets_the_type_of_its_setting_and_the_last_override_wins() -> None:
    settings = compose("quickstart", ["optimization.world_model_lr=1", "env.seed=3", "env.seed=4"])
    assert type(settings.optimization.world_model_lr) is float
    assert settings.env.seed == 4


def test_saved_settings_load_unchanged(tmp_path: Path) -> None:
    settings = compose("quickstart", ["optimization.replay_ratio=null", "env.seed=11"])
    save_settings(settings, tmp_path / "config.yaml")
    assert load_settings(tmp_path / "config.yaml") == settings
    assert load_settings(tmp_path / "config.yaml", ["env.seed=12"]).env.seed == 12
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


WRONG = {
    "env.nmae=walker": ["env.nmae", "env.name"],
    "batch_size=300": ["batch_size", "replay_buffer.batch_size"],
    "optimisation.gamma=0.9": ["optimisation.gamma", "optimization.gamma"],
    "hydra.job.chdir=true": ["hydra.job.chdir"],
    "env=walker": ["env is a section", "env.backend"],
    "env.seed=1.5": ["env.seed", "1.5", "whole number", "env.seed=0"],
    "env.seed=null": ["env.seed", "not Optional", "whole number"],
    "env.from_pixels=maybe": ["env.from_pixels", "maybe", "true or false"],
    "optimization.total_optim_steps=1e5": ["total_optim_steps", "100000.0", "whole number"],
    "env.name=[walker]": ["env.name", "a word"],
    "optimization.gamma=1.5": ["optimization.gamma=1.5", "at least 0.0 and at most 1.0", "optimization.gamma=0.99"],
    "optimization.gamma=nan": ["optimization.gamma=nan", "finite"],
    "optimization.grad_clip=inf": ["optimization.grad_clip=inf", "finite"],
    "env.seed=-1": ["env.seed=-1", "at least 0"],
    "collector.mode=lockstp": ["collector.mode=lockstp", "async", "set collector.mode=lockstep"],
    "env.name=${env.nothing}": ["env.name cannot be set", "env.nothing", "expected a word, or the key of another"],
    "walker": ["'walker'", "write key=value"],
    "=3": ["'=3'", "has no key"],
    "env.seed=[1": ["'env.seed=[1'", "key=value"],
    "+env.wind=3": ["+env.wind=3", "adds, deletes or sweeps"],
    "~env.seed": ["~env.seed", "adds, deletes or sweeps"],
    "env.seed=1,2,3": ["env.seed=1,2,3", "one value"],
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_override_is_explained_in_one_setting_error(override: str, tmp_path: Path) -> None:
    save_settings(Settings(), tmp_path / "config.yaml")
    for attempt in (
        lambda: compose("dm_control", [override]),
        lambda: load_settings(tmp_path / "config.yaml", [override]),
    ):
        with pytest.raises(SettingError) as caught:
            attempt()
        for part in WRONG[override]:
            assert part in str(caught.value)


@pytest.mark.parametrize("key", RECIPE_KEYS)
def test_the_error_for_a_key_of_torchrls_recipe_names_its_replacement(key: str) -> None:
    known = {name for name, _ in setting_keys()}
    assert key not in known, "an existing key must not have a replacement"
    with pytest.raises(SettingError, match="TorchRL's recipe") as caught:
        compose("dm_control", [f"{key.rstrip('.')}{'.enabled' if key.endswith('.') else ''}=1"])
    assert RECIPE_KEYS[key] in str(caught.value)


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("collector.total_frames=1000", "optimization.total_optim_steps"),
        ("total_frames=1000", "optimization.total_optim_steps"),
        ("optimization.train_every=5", "optimization.replay_ratio"),
        ("optim.utd_ratio=4", "optimization.replay_ratio"),
        ("logger.exp_name=x", "--run-dir"),
    ],
)
def test_the_error_for_a_key_of_other_trainers_names_its_replacement(override: str, fix: str) -> None:
    with pytest.raises(SettingError, match="there is no setting") as caught:
        compose("dm_control", [override])
    assert fix in str(caught.value) and "Meaning of" not in str(caught.value)


@pytest.mark.parametrize(("key", "value"), RECIPE_DEFAULTS.items())
def test_a_recipe_key_is_accepted_with_the_value_that_is_always_used_here_and_refused_with_another(
    key: str, value: str, tmp_path: Path
) -> None:
    save_settings(Settings(), tmp_path / "config.yaml")
    for spelled in (value, value.capitalize()):
        assert compose("dm_control", [f"{key}={spelled}", "env.seed=3"]) == compose("dm_control", ["env.seed=3"])
        assert load_settings(tmp_path / "config.yaml", [f"{key}={spelled}"]) == Settings()
    with pytest.raises(SettingError, match="TorchRL's recipe"):
        compose("dm_control", [f"{key}=7"])


SEVERAL_WRONG = {
    "env.nmae=walker": "write env.name=VALUE",
    "collector.total_frames=9": "optimization.total_optim_steps",
    "env.seed=abc": "env.seed=0",
    "optimization.gamma=1.5": "optimization.gamma=0.99",
    "logger.backend=wandbb": "set logger.backend=wandb",
    "walker": "write key=value",
}


def test_several_wrong_overrides_are_listed_in_one_error_with_a_fix_on_each_line(tmp_path: Path) -> None:
    save_settings(Settings(), tmp_path / "config.yaml")
    overrides = ["env.task=walk", *SEVERAL_WRONG]
    for attempt in (
        lambda: compose("dm_control", overrides),
        lambda: load_settings(tmp_path / "config.yaml", overrides),
    ):
        with pytest.raises(SettingError) as caught:
            attempt()
        head, *lines = str(caught.value).splitlines()
        assert head == "6 settings cannot work:"
        for (override, fix), line in zip(SEVERAL_WRONG.items(), lines, strict=True):
            assert override.split("=")[0] in line and fix in line


def test_several_wrong_keys_or_values_of_a_file_are_listed_in_one_error(tmp_path: Path) -> None:
    text = "defaults: [settings, _self_]\nenv:\n  {}\noptimization:\n  {}\n"
    for first, second in (("nmae: walker", "gama: 0.9"), ("seed: -1", "gamma: 1.5")):
        (tmp_path / "mine.yaml").write_text(text.format(first, second))
        with pytest.raises(SettingError) as caught:
            compose("mine", config_dir=tmp_path)
        head, *lines = str(caught.value).splitlines()
        assert head == "2 settings cannot work:" and len(lines) == 2
        assert first.split(":")[0] in lines[0] and second.split(":")[0] in lines[1]


def test_every_setting_that_a_replacement_names_exists() -> None:
    known = {name for name, _ in setting_keys()}
    sections = {name.split(".")[0] for name in known}
    texts = [*RECIPE_KEYS.values(), *OTHER_WORDS.values()]
    named = {word.rstrip(".") for text in texts for word in re.findall(r"[a-z_]+\.[a-z_.]+", text)}
    named = {word for word in named if word.split(".")[0] in sections}
    assert len(named) >= 6
    assert named <= known


def test_the_error_for_an_unknown_config_suggests_the_nearest() -> None:
    with pytest.raises(
        SettingError, match=r"no config 'quickstat' in configs/; expected one of .*; use --config quickstart$"
    ):
        compose("quickstat")


@pytest.mark.parametrize(
    ("config", "override"),
    [("xyzzy", "env.seed=1"), ("quickstart", "xyzzy.plugh=1"), ("quickstart", "collector.mode=xyzzy")],
)
def test_nothing_is_suggested_that_is_not_near(config: str, override: str) -> None:
    with pytest.raises(SettingError, match=r"(with one of them|remove it, or look|to one of them)[^=]*$"):
        compose(config, [override])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("defaults: [settings, _self_]\nenv:\n  nmae: walker\n", ["env.nmae", "mine.yaml", "env.name"]),
        ("defaults: [settings, _self_]\nenv:\n  seed: abc\n", ["env.seed", "abc", "whole number"]),
        ("env:\n  seed: 1\n", ["defaults: [settings, _self_]"]),
        ("env: [\n", ["mine.yaml", "cannot be read"]),
        ("- env\n", ["mine.yaml", "sections"]),
        ("defaults: 3\n", ["mine.yaml", "defaults: 3", "write 'defaults: [settings, _self_]'"]),
        ("defaults: [3]\n", ["'mine'", "expected settings"]),
        ("defaults: [nothing, _self_]\n", ["'mine'", "nothing"]),
        ("defaults: [[settings]]\n", ["'mine'", "expected settings"]),
    ],
)
def test_a_wrong_config_file_is_explained_in_one_setting_error(text: str, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(SettingError) as caught:
        compose("mine", config_dir=tmp_path)
    for part in parts:
        assert part in str(caught.value)


def test_the_error_for_a_word_instead_of_a_list_shows_how_to_write_a_list() -> None:
    with pytest.raises(SettingError, match=r"env\.obs_groups.*a list of words, such as \[a,b\]"):
        compose("quickstart", ["env.obs_groups=policy"])


NUMBERS = [(key, field) for key, field in setting_keys() if re.search("int|float", str(field.type))]


@pytest.mark.parametrize("key", [key for key, _ in NUMBERS])
def test_a_number_of_400_digits_is_refused(key: str) -> None:
    for value in ("1" + "0" * 400, "-1" + "0" * 400):
        with pytest.raises(SettingError, match=key):
            compose("quickstart", [f"{key}={value}"])


def test_every_integer_has_bounds_and_seeds_leave_room_for_restarts_and_resumes() -> None:
    without = [key for key, field in NUMBERS if "int" in str(field.type) and field.metadata["maximum"] is None]
    assert not without
    with pytest.raises(SettingError, match=r"env\.seed=4294967295 is out of bounds"):
        compose("quickstart", ["env.seed=4294967295"])
    largest = compose("quickstart", ["env.seed=2147483647"]).env.seed
    assert largest + 1000 * 1000 + 1_000_000 * 1000 < 2**32


@pytest.mark.parametrize("kept", [0, 10, 60, 82])
def test_a_saved_file_that_was_cut_is_refused(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_settings(compose("quickstart"), path)
    lines = path.read_text().splitlines(keepends=True)[:kept]
    while lines and lines[-1].rstrip().endswith(":"):  # a section without settings is another error
        lines.pop()
    path.write_text("".join(lines))
    with pytest.raises(SettingError, match=r"config\.yaml lacks .*deadlines\.stop_s; expected .*; restore the file"):
        load_settings(path)


@pytest.mark.parametrize("lacking", ["eval_action", "max_restarts", "entropy_scale"])
def test_a_setting_that_an_old_file_lacks_takes_its_default_and_is_named(lacking: str, tmp_path: Path) -> None:
    path, lines = tmp_path / "config.yaml", []
    save_settings(compose("quickstart", ["env.seed=7"]), path)
    kept = [line for line in path.read_text().splitlines(keepends=True) if not line.strip().startswith(f"{lacking}:")]
    path.write_text("".join(kept))
    default = {key: field.default for key, field in setting_keys() if key.endswith(f".{lacking}")}
    settings = load_settings(path, on_missing=lines.append)
    assert settings.env.seed == 7
    assert [line.partition("their defaults: ")[2] for line in lines] == [f"{k}={v}" for k, v in default.items()]
    for key, value in default.items():
        section, _, name = key.rpartition(".")
        assert getattr(getattr(settings, section), name) == value
        assert load_settings(path, [f"{key}={value}"]) == settings


def test_an_unknown_setting_in_an_old_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_settings(compose("quickstart"), path)
    path.write_text(path.read_text().replace("env:\n", "env:\n  wind: 3\n"))
    with pytest.raises(SettingError, match=r"there is no setting env\.wind"):
        load_settings(path)


def test_the_config_of_a_run_is_a_config_too(tmp_path: Path) -> None:
    before = compose("quickstart", ["env.seed=7", "optimization.gamma=0.9"])
    save_settings(before, tmp_path / "config.yaml")
    for path in (tmp_path, tmp_path / "config.yaml"):
        again = compose(str(path), ["env.seed=8"])
        assert (again.env.seed, again.optimization.gamma) == (8, 0.9)
        again.env.seed = 7
        assert again == before


def test_a_file_of_the_user_changes_some_settings(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [settings, _self_]\nenv:\n  seed: 5\n")
    settings = compose(f"{tmp_path}/mine.yaml", ["env.frame_skip=4"])
    assert (settings.env.seed, settings.env.frame_skip, settings.env.name) == (5, 4, Settings().env.name)


def test_a_file_of_the_user_with_another_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text("defaults: [settings, _self_]\n")
    with pytest.raises(SettingError, match=r"mine\.yml has defaults; expected a name that ends in \.yaml"):
        compose(str(tmp_path / "mine.yml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"mine\.yaml cannot be read: .*No such file"),
        ("env:\n  seed: 5\n", r"mine\.yaml lacks env\.backend, .*begins with 'defaults: \[settings, _self_\]'"),
        ("defaults: [settings, _self_]\nenv:\n  sed: 5\n", r"there is no setting env\.sed \(in mine\.yaml\)"),
        ("defaults: [settings, _self_]\nenv:\n  seed: x\n", r"env\.seed has a value of the wrong type"),
    ],
)
def test_a_file_of_the_user_that_cannot_work_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingError, match=message):
        compose(str(path))


@pytest.mark.parametrize(("text", "expected"), [("2", 2), ("0.5", 0.5), ("[1,0.5]", [1, 0.5])])
def test_the_scale_of_actions_is_a_number_or_a_list_of_numbers(text: str, expected: object, tmp_path: Path) -> None:
    settings = compose("isaaclab", [f"env.action_scale={text}"])
    assert settings.env.action_scale == expected
    save_settings(settings, tmp_path / "config.yaml")
    assert load_settings(tmp_path / "config.yaml") == settings


@pytest.mark.parametrize("text", ["wide", "[]", "[1,wide]", "true", "null", "{a:1}", "[1,[2]]"])
def test_a_scale_of_actions_that_is_something_else_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"env\.action_scale.* expected a number, or a list of numbers such"):
        compose("isaaclab", [f"env.action_scale={text}"])


def test_every_number_in_a_list_has_the_bounds_of_the_setting() -> None:
    with pytest.raises(SettingError, match=r"env\.action_scale=-2 is out of bounds; expected a finite number"):
        compose("isaaclab", ["env.action_scale=[1,-2]"])
