"""The rules of CONTRIBUTING.md that lint-imports cannot check: sizes, names, and imports of tests."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from benchmarks.house import GROUPS, Source, class_collisions, function_collisions, library, sources

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 500  # lines of a file
FOLDERS = [folder for folders in GROUPS.values() for folder in folders]


@cache
def files(*folders: str) -> list[Source]:
    return sources(ROOT, folders)


def test_no_file_is_longer_than_500_lines() -> None:
    assert {str(s.path): s.lines for s in files(*FOLDERS) if s.lines > LONGEST} == {}


def test_a_class_name_means_one_thing() -> None:
    assert class_collisions(library(ROOT)) == {}


def test_a_function_that_other_packages_import_has_a_name_of_its_own() -> None:
    assert function_collisions(library(ROOT)) == {}


def test_no_test_imports_a_test() -> None:
    found = []
    for source in files("tests"):
        for one in source.imports:
            names = {*one.module.split("."), one.name or ""}
            if one.module.split(".")[0] == "tests" and any(name.startswith("test_") for name in names):
                found.append(f"{source.path}:{one.line} imports {one.module}")
    assert found == [], "shared helpers belong in tests/support"


def test_no_test_file_imports_the_training_stack_at_its_top() -> None:
    """DeepSpeed, megatron-core and transformers take seconds to import: test files import them only where used."""
    heavy = {"deepspeed", "megatron.core", "transformers"}
    found = []
    for source in files("tests"):
        top = {node.lineno for node in source.tree.body}
        for one in source.imports:
            parts = one.module.split(".")
            if one.line in top and heavy & {parts[0], ".".join(parts[:2])}:
                found.append(f"{source.path}:{one.line} imports {one.module}")
    assert found == []


def test_a_script_finds_the_project_before_it_imports_it() -> None:
    """`python tools/datasets/x.py` works in any folder, though its imports work from the root without the path, too."""
    found = []
    for source in files("tools", "launch", "benchmarks", "examples"):
        calls = [node.lineno for node in source.tree.body if ast.unparse(node).startswith("sys.path.insert(")]
        for one in source.imports:
            if calls and one.line < calls[0] and one.module.split(".")[0] in FOLDERS:
                found.append(f"{source.path}:{one.line} imports {one.module}")
    assert found == []


def test_nothing_walks_the_frames_of_running_threads() -> None:
    """CPython 3.11 crashes on frame objects of a thread that runs on; faulthandler reads stacks without them."""
    walks = re.compile(r"\b(_current_frames|f_back)\b")
    found = [f"{s.path}" for s in files("megatron", "tools") if walks.search(re.sub(r"`.*?`", "", s.text))]
    assert found == []


def test_every_path_of_the_hooks_exists() -> None:
    """Including those in `files:`, whose regular expressions name folders and files."""
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        if repo["repo"] == "local"
        for hook in repo["hooks"]
    ]
    assert {hook["id"] for hook in hooks} >= {"ruff-check", "ruff-format", "mypy", "imports", "schema"}
    for hook in hooks:
        words = [word for word in hook["entry"].split() if "/" in word and not word.startswith(".venv/")]
        words += re.findall(r"\w+/[\w/]+(?:\\?\.\w+)?", hook.get("files", ""))
        for word in words:
            assert (ROOT / word.replace("\\", "").split("::")[0]).exists(), f"{hook['id']}: there is no {word}"


def test_every_folder_of_tests_has_a_budget() -> None:
    budget = yaml.safe_load((ROOT / "tests" / "budget.yml").read_text())
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert set(budget) == folders
    assert all(minutes > 0 for minutes in budget.values())


def test_every_link_of_the_guides_leads_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    missing = [
        f"{page.name}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())
        if not (page.parent / link).exists()
    ]
    assert missing == []
