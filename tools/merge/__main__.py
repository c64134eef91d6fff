"""Entry point of `python tools/merge`: works from any directory, imports this repository and few libraries."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Python puts this folder on the path instead of the repository's root.
sys.path[:] = [str(HERE.parent.parent)] + [p for p in sys.path if not p or Path(p).resolve() != HERE]

from tools.merge.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
