"""Numbers in sentences."""

from __future__ import annotations


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return `1 epoch` or `2 epochs`.

    Args:
        number: how many.
        one: what follows the number 1.
        many: what follows all others; `one` with an s if None.
    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
