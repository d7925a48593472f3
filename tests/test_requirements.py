"""The lists of packages agree: pyproject.toml, the requirements beside Isaac Sim, and both files of constraints."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parent.parent
BROUGHT = {"torch", "numpy", "hydra-core", "omegaconf", "tensorboard"}  # by Isaac Sim and Isaac Lab
OTHER_SIMULATORS = {"torchrl", "dm-control", "mujoco"}


def _listed(name: str) -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in (REPO / name).read_text().splitlines())
    return _by_name([line for line in lines if line])


def _by_name(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def _dependencies() -> dict[str, Requirement]:
    return _by_name(tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"])


def test_every_dependency_is_brought_by_isaac_sim_or_listed_for_it_or_belongs_to_another_simulator() -> None:
    listed = _listed("requirements-isaacsim.txt")
    assert set(_dependencies()) == BROUGHT | OTHER_SIMULATORS | (set(_dependencies()) & set(listed))
    assert not set(listed) & (BROUGHT | OTHER_SIMULATORS)


def test_the_lowest_versions_beside_isaac_sim_are_those_of_the_project() -> None:
    listed = _listed("requirements-isaacsim.txt")
    for name, requirement in _dependencies().items():
        if name in listed:
            lowest = {spec for spec in requirement.specifier if spec.operator == ">="}
            assert lowest <= set(listed[name].specifier), f"{name}: {listed[name]}"


def test_the_versions_of_both_constraints_are_supported() -> None:
    for file in ("constraints.txt", "constraints-isaacsim.txt"):
        pinned = _listed(file)
        for name, requirement in _dependencies().items():
            for spec in pinned[name].specifier if name in pinned else ():
                assert requirement.specifier.contains(spec.version), f"{file}: {name}=={spec.version}"


def test_the_checks_run_the_commands_that_the_page_on_isaac_lab_shows() -> None:
    page = (REPO / "docs" / "isaaclab.md").read_text()
    shown = re.findall(r"^pip install (--no-deps (?:-e \.|-r requirements-isaacsim\.txt))$", page, re.MULTILINE)
    tier = (REPO / ".ci" / "tier-isaacsim").read_text()
    assert len(shown) == 2
    assert re.findall(r'^"\$\{install\[@\]\}" (--no-deps -.*)$', tier, re.MULTILINE) == shown
