"""The pages are up to date, their links lead somewhere, and the files and settings that they name exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shared.compose import setting_keys
from shared.metrics import find
from tests.docs.pages import PAGES, REPO, anchors, inline_code, links

SUFFIXES = (".py", ".md", ".yaml", ".yml", ".json", ".sbatch", ".toml", ".txt")
KEYS = {key for key, _ in setting_keys()}
SECTIONS = {key.partition(".")[0] for key in KEYS}
SETTING = re.compile(rf"((?:{'|'.join(sorted(SECTIONS))})\.[a-z_.]+)(?:=\S+)?")
OF_A_RUN = (
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "summary.json",
    "status.json",
    "manifest.json",
    "policy.json",
    "run_policy.py",
)  # of a run folder, not of the repository


def _each(page: Path) -> str:
    return page.name


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], cwd=REPO, capture_output=True, text=True, timeout=300)


def test_generated_parts_are_up_to_date() -> None:
    done = _run("docs.generate", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = _run("mkdocs", "build", "--strict", "--site-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "architecture.html").exists() and (tmp_path / "readme.html").exists()


@pytest.mark.parametrize("page", PAGES, ids=_each)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in links(page):
        if re.match(r"\w+:", link):
            continue  # another site: no test depends on the network
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}, but there is no such file"
        assert not anchor or anchor in anchors(target), (
            f"{page.name} links to {link}, but that page has no such heading"
        )


@pytest.mark.parametrize("page", PAGES, ids=_each)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    for code in inline_code(page):
        if code.endswith(SUFFIXES) and not re.search(r"[\s*{<]|NAME|runs/", code) and code not in OF_A_RUN:
            assert (REPO / code).exists(), f"{page.name} names {code}, which does not exist"
        elif re.fullmatch(r"[\w./-]+/", code) and not re.match(
            r"(runs|report|videos|export|tb|logs|checkpoints|crash|repository)\b", code
        ):
            assert (REPO / code).is_dir(), f"{page.name} names the folder {code}, which does not exist"


@pytest.mark.parametrize("page", PAGES, ids=_each)
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    for code in inline_code(page):
        if (named := SETTING.fullmatch(code)) and not code.endswith(SUFFIXES):
            assert named[1] in KEYS or code == "logger.video=False", f"{page.name} names {code}, which is no setting"


def test_every_metric_that_the_explanations_name_exists() -> None:
    explained = (REPO / "docs" / "metrics.md").read_text().partition("<!-- generated: metrics -->")[0]
    names = re.findall(
        r"`((?:open_loop|repeat_last|kl|imagined|recorded|policy|sampled|replay_ratio|collector)_\w*)", explained
    )
    assert len(names) > 8
    for name in names:
        known = find(name) or find(f"{name}policy_5")  # `open_loop_*_5` stands for all entries
        assert known is not None, f"docs/metrics.md explains {name}, which is no metric"


def test_every_message_in_troubleshooting_is_one_that_the_code_writes() -> None:
    page = (REPO / "docs" / "troubleshooting.md").read_text()
    symptoms = [row.partition(" | ")[0] for row in page.splitlines() if row.startswith("| ")]
    quoted = [code for symptom in symptoms for code in re.findall(r"`([^`]+)`", symptom) if " " in code]
    assert len(quoted) > 5
    messages = _messages()
    for message in quoted:
        parts = [part for part in re.split(r"\.\.\.|\d[\d.]*", message) if part.strip()]
        found = any(all(part in text for part in parts) for text in messages)
        assert found, f"docs/troubleshooting.md quotes {message!r}, which no file of the project writes"


def _messages() -> list[str]:
    """Return the text of every string in the code, with a gap for each value that it is filled with."""
    packages = ("launcher", "shared", "collector_proc", "learner_proc")
    sources = [REPO / "launch.py", *(path for package in packages for path in (REPO / package).rglob("*.py"))]
    found = []
    for node in (node for path in sources for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.JoinedStr):
            found.append(
                "".join(str(part.value) if isinstance(part, ast.Constant) else " ... " for part in node.values)
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_the_tree_in_the_readme_names_what_is_there() -> None:
    """Every name of the tree exists, and every package and every file of the top level is in it."""
    text = (REPO / "README.md").read_text()
    tree = text.partition("## The tree\n")[2].partition("```\n")[2].partition("```")[0]
    folder, named = "", set()
    for line in tree.splitlines():
        names = re.findall(r"[\w.]+(?:\.py|/)", line.partition("   ")[0] if not line.startswith(" ") else line)
        if not line.startswith(" "):
            folder = names[0] if len(names) == 1 and names[0].endswith("/") else ""
            named |= set(names)
        for name in names:
            path = REPO / ("" if not line.startswith(" ") else folder) / name
            assert path.exists(), f"the tree in README.md names {path.relative_to(REPO)}, which does not exist"
    packages = {f"{path.parent.name}/" for path in REPO.glob("*/__init__.py")}
    assert packages | {"launch.py", "configs/", "tests/", "docs/"} <= named


def test_the_readme_opens_its_reading_order_with_the_plain_step() -> None:
    order = (REPO / "README.md").read_text().partition("## Read these files in this order\n")[2]
    assert order.lstrip().startswith("1. `learner_proc/plain_step.py`")
