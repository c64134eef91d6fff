"""python -m tools.probe COMMAND ..."""

import sys

from tools.probe.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
