"""`python -m megatron.preflight`."""

import os
import sys
import traceback
import warnings

from megatron.parallel.rank_env import IGNORED_WARNINGS

# Otherwise a rank that loses rank 0 prints a page of addresses before its own message.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
for text in IGNORED_WARNINGS:
    warnings.filterwarnings("ignore", message=text.partition(":")[2])

from megatron.preflight.command_line import main  # noqa: E402

if __name__ == "__main__":
    code = 1
    try:
        code = main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without destructors, since those of process groups would wait for each other
