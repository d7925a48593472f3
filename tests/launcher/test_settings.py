"""Settings that cannot work on this machine, or that contradict a checkpoint, are refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.devices import Devices, Gpu
from launcher.settings import changed_settings, check_changes, check_compiler, check_gpu_compiler
from shared.compose import setting_keys
from shared.config import Settings
from shared.errors import SettingError

GPU = Devices(Gpu(0, "GPU-a", "H100"), Gpu(0, "GPU-a", "H100"))
CPU = Devices(None, None)


@pytest.fixture(autouse=True)
def _empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The PATH has no compiler until a test adds one."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)


def _add_program(folder: Path, name: str) -> None:
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)


def _settings(*, enabled: bool = True, backend: str = "inductor") -> Settings:
    settings = Settings()
    settings.optimization.compile.enabled, settings.optimization.compile.backend = enabled, backend
    return settings


def test_compilation_needs_a_compiler_for_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match=r"no C\+\+ compiler \(g\+\+ or clang\+\+\).*apt install g\+\+"):
        check_compiler(_settings())
    check_compiler(_settings(enabled=False))
    check_compiler(_settings(backend="aot_eager"))
    _add_program(tmp_path, "clang++")
    check_compiler(_settings())
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(SettingError, match=r"no C\+\+ compiler \(icpx\)"):
        check_compiler(_settings())


def test_compilation_for_a_gpu_needs_a_c_compiler_and_the_headers_of_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(SettingError, match=r"a C compiler \(gcc .*\) and the headers of Python \(.*Python\.h"):
        check_gpu_compiler(_settings(), GPU)
    check_gpu_compiler(_settings(), CPU)
    check_gpu_compiler(_settings(enabled=False), GPU)
    check_gpu_compiler(_settings(backend="eager"), GPU)
    (tmp_path / "Python.h").touch()
    with pytest.raises(SettingError, match=r"lacks a C compiler \(gcc or clang or cc\); expected"):
        check_gpu_compiler(_settings(), GPU)
    _add_program(tmp_path, "mycc")
    monkeypatch.setenv("CC", "mycc")
    check_gpu_compiler(_settings(), GPU)


def _with(key: str, value: object) -> Settings:
    settings = Settings()
    section, _, name = key.rpartition(".")
    setattr(getattr(settings, section), name, value)
    return settings


@pytest.mark.parametrize(
    ("key", "value"),
    [("networks.activation", "relu"), ("networks.init_std", 1.0), ("env.task", "walk"), ("env.frame_skip", 4)],
)
def test_a_resume_cannot_change_what_the_checkpoint_means(key: str, value: object) -> None:
    with pytest.raises(SettingError, match=rf"{key}={value} changes the meaning .* made with {key}=.*start a new run"):
        check_changes(Settings(), _with(key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [("optimization.actor_lr", 1e-5), ("networks.exploration_noise", 0.1), ("env.seed", 5), ("env.horizon", 100)],
)
def test_a_resume_may_change_how_the_training_goes_on(key: str, value: object) -> None:
    check_changes(Settings(), _with(key, value))
    default = {name: field.default for name, field in setting_keys()}[key]
    assert changed_settings(Settings(), _with(key, value)) == [(key, default, value)]
