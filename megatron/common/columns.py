"""Text in aligned columns, for tables of a log: `rich` would wrap or cut them at the width of a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def align_columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """A line for each row, two spaces between columns; those in `right` are right-aligned, the others left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    aligned = [
        [
            item.rjust(width) if column in right else item.ljust(width)
            for column, (item, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return ["  ".join(row).rstrip() for row in aligned]
