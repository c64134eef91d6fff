"""Finds messages that tell a user what to do, recognized by an option, a key in backticks, or a command."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Configuration, checkpoint, resume, launch and reading of the data.
WHERE = (
    "megatron/neox_arguments",
    "megatron/checkpoint",
    "megatron/launcher",
    "megatron/preflight/run_inputs.py",
    "megatron/trainer/schedule.py",
    "megatron/trainer/initial_loss.py",
    "megatron/parallel/rank_env.py",
    "megatron/parallel/handover.py",
    "megatron/parallel/process_groups.py",
    "megatron/data/build.py",
    "megatron/data/header.py",
    "megatron/data/indexed.py",
    "megatron/data/index_cache.py",
    "launch/render.py",
    "launch/sites.py",
)
_ADVISES = re.compile(r"--[a-z][\w-]+|`[a-z][^`]*`|\bpython \S+|\bsrun\b|\bsbatch\b|\bpip install\b|\bexport [A-Z]")
_NO_MESSAGES = {"key", "required", "derived", "Field", "add_argument", "ArgumentParser", "add_parser", "compile"}


def messages() -> Iterator[tuple[str, int, str]]:
    """(file, line, text) of every message that advises; `{}` stands for inserted values."""
    for place in WHERE:
        path = ROOT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            tree = ast.parse(file.read_text())
            for node in _raised_or_returned(tree):
                text = _text(node)
                if _ADVISES.search(text):
                    yield str(file.relative_to(ROOT)), node.lineno, text


def _raised_or_returned(tree: ast.AST) -> Iterator[ast.expr]:
    """Strings outside docstrings and declarations of keys and options."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))  # docstrings
        if isinstance(node, ast.Call) and _name(node.func) in _NO_MESSAGES:
            skipped.update(id(inner) for inner in ast.walk(node))
        if isinstance(node, ast.JoinedStr):
            skipped.update(id(inner) for inner in ast.walk(node) if inner is not node)
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        text = isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
        if text and isinstance(node, ast.expr) and " " in _text(node):
            yield node


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return str(getattr(node, "value", ""))
