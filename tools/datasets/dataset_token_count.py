"""Tokens in `.bin/.idx` pairs, as GPT-NeoX prints them: python tools/datasets/dataset_token_count.py PREFIX [...]"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main(arguments: list[str]) -> int:
    """Exit code 2 if a pair could not be read; the others are still counted."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    from megatron.common.errors import UserError
    from megatron.data.indexed import IndexedFile

    code = 0
    for prefix in arguments:
        print("Checking file", prefix)
        try:
            print("Dataset size in tokens is", IndexedFile(prefix).num_tokens)
        except (UserError, OSError) as error:
            print(f"dataset_token_count.py: {error}", file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
