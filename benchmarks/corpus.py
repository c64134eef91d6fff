"""Real text available on every machine: files of Python and of the installed packages."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

ENDINGS = {".py", ".md", ".rst", ".txt", ".pyi", ".h", ".html", ".tex", ".css", ".js"}


def real_documents(total_bytes: int) -> Iterator[str]:
    """Library sources, documentation and licenses, one document per file, up to `total_bytes` of UTF-8 in total.

    The order is the same on every machine with the same packages. Raises RuntimeError if there is not enough.
    """
    given = 0
    for folder in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_paths()[folder]).rglob("*")):
            if path.suffix not in ENDINGS or not path.is_file() or path.stat().st_size > 2_000_000:
                continue
            try:
                text = path.read_bytes().decode()
            except UnicodeDecodeError:
                continue
            if not text.strip():
                continue
            yield text
            given += len(text.encode())
            if given >= total_bytes:
                return
    raise RuntimeError(f"only {given} bytes of text are installed, but {total_bytes} were requested")
