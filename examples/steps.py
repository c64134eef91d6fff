"""A run as a sequence of commands, each printed as you could type it, then run."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKER = ".made_by_an_example"
REPLACES = "folder for the results; an earlier run's is replaced"


def replace_output(folder: Path, parser: argparse.ArgumentParser) -> None:
    """Make an empty output folder in place of an earlier run's. Exits with code 2 if `folder` has other contents."""
    if folder.exists() and not (folder / MARKER).exists() and not (folder.is_dir() and not any(folder.iterdir())):
        parser.error(f"--output {folder} exists and was not written by an example: give another folder, or remove it")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()


class Steps:
    def __init__(self) -> None:
        self.step = 0
        self._start = time.monotonic()

    def title(self, text: str) -> None:
        self.step += 1
        print(f"\n=== {self.step}. {text}  [{time.monotonic() - self._start:.0f} s]", flush=True)

    def python(self, *arguments: object) -> None:
        """Run a command with this Python from the root of the repository. Raises SystemExit if it fails."""
        words = [str(argument) for argument in arguments]
        print("$ python " + shlex.join(words), flush=True)
        # Spinning threads made training the base model eight times slower on a machine with other load.
        environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        code = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=False).returncode
        if code:
            raise SystemExit(f"step {self.step} failed with exit code {code}")
