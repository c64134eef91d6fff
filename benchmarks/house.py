"""Code metrics: sizes, import edges between packages, ambiguous names, time to collect the tests.

    python benchmarks/house.py [ROOT] [--json FILE] [--details] [--no-collection]

Works on any checkout of this repository, including older ones, without importing it. The library is megatron/, tools/,
launch/ and the programs at the root. An edge is an import from one package to another; it points upward if ORDER lists
the imported package before the importing one. Two classes of the library collide if they share a public name; two
top-level functions collide if, in addition, one of them is imported by another package. All repeated function names
are counted as well.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import statistics
import subprocess
import sys
import time
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

# Packages from the top to the base: an import goes from left to right.
ORDER = (
    "launcher",
    "preflight",
    "planner",
    "trainer",
    "evaluation",
    "generation",
    "supervision",
    "checkpoint",
    "engine",
    "model",
    "ops",
    "data",
    "parallel",
    "neox_arguments",
    "tokenizer",
    "layout",
    "common",
)
GROUPS = {
    "library": ("megatron", "tools", "launch"),
    "tests": ("tests",),
    "benchmarks and examples": ("benchmarks", "examples"),
}
SHORT = 60  # lines
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One imported module, or one `name` imported from it."""

    module: str
    name: str | None
    line: int


@dataclass(frozen=True)
class Source:
    """A Python file by its path below the root, such as megatron/ops/build.py."""

    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def lines(self) -> int:
        return self.text.count("\n")

    @property
    def module(self) -> str:
        parts = self.path.with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def package(self) -> str:
        """`megatron.ops`, `tools.datasets`; `launch`; the module itself for a program at the root."""
        folders = self.path.parts[:-1]
        return ".".join(folders[:2]) if folders else self.module

    @cached_property
    def imports(self) -> list[Import]:
        """All imports, including those inside functions and for type checking."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [Import(alias.name, None, node.lineno) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found += [Import(node.module, alias.name, node.lineno) for alias in node.names]
        return found

    @cached_property
    def functions(self) -> list[Function]:
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]

    @cached_property
    def code_lines(self) -> int:
        """Number of lines with code, excluding comments, docstrings and blank lines."""
        docstrings: set[int] = set()
        for node in ast.walk(self.tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                value = body[0].value
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    docstrings |= set(range(body[0].lineno, (body[0].end_lineno or 0) + 1))
        code: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in LAYOUT:
                code |= set(range(token.start[0], token.end[0] + 1))
        return len(code - docstrings)


def sources(root: Path, folders: Iterable[str]) -> list[Source]:
    found = []
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            if "__pycache__" not in path.parts:
                found.append(Source(path.relative_to(root), path.read_text()))
    return found


def library(root: Path) -> list[Source]:
    programs = [Source(path.relative_to(root), path.read_text()) for path in sorted(root.glob("*.py"))]
    return [source for source in programs if source.module != "setup"] + sources(root, GROUPS["library"])


def upward_edges(files: list[Source]) -> dict[str, list[str]]:
    """`importing -> imported` for packages of megatron, each with the locations of its imports."""
    rank = {f"megatron.{name}": number for number, name in enumerate(ORDER)}
    edges: dict[str, list[str]] = defaultdict(list)
    for source in files:
        for one in source.imports:
            names = {".".join(one.module.split(".")[:2])}
            if one.module == "megatron" and one.name:
                names = {f"megatron.{one.name}"}
            for target in names:
                if rank.get(target, len(ORDER)) < rank.get(source.package, -1):
                    edges[f"{source.package} -> {target}"].append(f"{source.path}:{one.line}")
    return dict(edges)


def importing(files: list[Source], name: str) -> list[str]:
    """Paths of the files that import a top-level package."""
    return [str(s.path) for s in files if any(one.module.split(".")[0] == name for one in s.imports)]


def repeated_functions(files: list[Source]) -> dict[str, list[str]]:
    """Public names of functions that several modules define."""
    return _repeated((source, node.name) for source in files for node in source.tree.body if isinstance(node, Function))


def class_collisions(files: list[Source]) -> dict[str, list[str]]:
    """Public names of classes that several modules define."""
    return _repeated((source, node.name) for source in files for node in source.tree.body if _is_class(node))


def function_collisions(files: list[Source]) -> dict[str, list[str]]:
    """The repeated functions that one of the modules defines for other packages."""
    repeated = repeated_functions(files)
    imported = {name for source, name in _used_elsewhere(files) if str(source.path) in repeated.get(name, [])}
    return {name: paths for name, paths in repeated.items() if name in imported}


def _is_class(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef)


def _repeated(defined: Iterable[tuple[Source, str]]) -> dict[str, list[str]]:
    places: dict[str, list[str]] = defaultdict(list)
    for source, name in defined:
        if not name.startswith("_") and name != "main":
            places[name].append(str(source.path))
    return {name: paths for name, paths in sorted(places.items()) if len(paths) > 1}


def _used_elsewhere(files: list[Source]) -> Iterator[tuple[Source, str]]:
    """(defining file, name) of everything that a file of another package imports, or reads from an imported module."""
    by_module = {source.module: source for source in files}
    for source in files:
        modules: dict[str, Source] = {}  # by the name they have in this file
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    whole = by_module.get(f"{node.module}.{alias.name}")
                    if whole:
                        modules[alias.asname or alias.name] = whole
                    for target in _definers(by_module.get(node.module), alias.name, by_module):
                        if target.package != source.package:
                            yield target, alias.name
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                for target in _definers(modules[node.value.id], node.attr, by_module):
                    if target.package != source.package:
                        yield target, node.attr


def _definers(source: Source | None, name: str, by_module: dict[str, Source]) -> Iterator[Source]:
    """The file itself, or the file from which it imports the name."""
    if source is None:
        return
    again = [one.module for one in source.imports if one.name == name]
    if again and again[0] in by_module and again[0] != source.module:
        yield from _definers(by_module[again[0]], name, by_module)
    else:
        yield source


def collection_seconds(root: Path, rounds: int = 3) -> float:
    """Median time of `pytest --collect-only` after an uncounted first run, which writes compiled files."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - start)
        if done.returncode:
            raise SystemExit(f"collecting the tests of {root} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return statistics.median(seconds[1:])


def sizes(files: list[Source]) -> dict[str, Any]:
    longest = max(files, key=lambda source: source.lines)
    functions = [(node.end_lineno - node.lineno + 1, source, node) for source in files for node in source.functions]  # type: ignore[operator]
    length, source, node = max(functions, key=lambda entry: entry[0])
    return {
        "files": len(files),
        "code lines": sum(source.code_lines for source in files),
        "median lines of a file": statistics.median(source.lines for source in files),
        "longest file": f"{longest.lines} ({longest.path})",
        f"files under {SHORT} lines": sum(source.lines < SHORT for source in files),
        "longest function": f"{length} ({source.path}:{node.lineno} {node.name})",
    }


def figures(root: Path, collection: bool) -> tuple[dict[str, Any], dict[str, dict[str, list[str]]]]:
    """Metrics by heading, and details of those that count problems."""
    ours = library(root)
    found: dict[str, Any] = {"library": sizes(ours)}
    for group in ("tests", "benchmarks and examples"):
        found[group] = sizes(sources(root, GROUPS[group]))
    details = {
        "upward package edges": upward_edges(ours),
        "files importing DeepSpeed": {path: [] for path in importing(ours, "deepspeed")},
        "class-name collisions": class_collisions(ours),
        "function-name collisions": function_collisions(ours),
        "function names used twice": repeated_functions(ours),
    }
    found["boundaries"] = {name: len(entries) for name, entries in details.items()}
    if collection:
        found["tests"]["collection, seconds"] = round(collection_seconds(root), 1)
    return found, details


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--details", action="store_true", help="name the edges, files and collisions")
    parser.add_argument("--no-collection", action="store_true", help="do not run pytest")
    options = parser.parse_args()
    found, details = figures(options.root.resolve(), not options.no_collection)
    for heading, numbers in found.items():
        print(heading)
        for name, value in numbers.items():
            print(f"  {name:26} {value}")
    if options.details:
        for heading, entries in details.items():
            print(heading)
            for name, places in entries.items():
                print(f"  {name:40} {', '.join(places)}")
    if options.json:
        options.json.write_text(json.dumps(found | {"details": details}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
