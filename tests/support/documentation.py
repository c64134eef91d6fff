"""The commands and code blocks in the documentation."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def code_blocks(page: str, language: str) -> list[str]:
    """The ```language blocks of a page, given relative to the repository."""
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def documented_commands(page: str) -> list[str]:
    """Commands in the ```bash blocks of a page, continued lines joined, comments cut."""
    lines = "\n".join(code_blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"\s+#.*", "", line).strip() for line in lines) if line]


def run_in_root(words: list[str], timeout: int = 280, typed: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command from the root of the repository and capture its output; the caller checks the exit code."""
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False, input=typed)
