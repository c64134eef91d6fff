"""Numbers of things in messages."""


def quantity(number: int, thing: str) -> str:
    """`1 rank`, `2,048 ranks`."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
