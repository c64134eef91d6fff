"""`python -m megatron.launcher.preflight`."""

import os
import sys
import warnings

from megatron.launcher.start import QUIET

for text in QUIET:
    warnings.filterwarnings("ignore", message=text.partition(":")[2])

from megatron.launcher.preflight.command_line import main  # noqa: E402

if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is said: destructors of process groups would wait for each other
