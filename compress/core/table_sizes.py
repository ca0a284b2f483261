"""Whether the tables of a matrix outweigh what their codes save.

Tables are stored with each matrix, so that a small one cannot have large ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from compress.core.scheme import Scheme

_LEAST_RUNS = 16  # for each entry of a table
_MOST_OVERHEAD = 1.5  # bits with tables and scales, over those of codes


def too_large(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Return why tables are too large for a matrix; ``None`` if they are not.

    Args:
        scheme: Of tables for a whole matrix, or for each run of its columns.
        shape: Rows and columns; whole runs.
    """
    rows, columns = shape
    book, entries = scheme.codebook, 1 << scheme.bits
    assert book is not None
    runs = rows if book.positional else rows * columns // book.vector
    nominal = scheme.bits * book.count / book.vector
    stored = scheme.bits_per_weight(columns, rows)
    if runs < _LEAST_RUNS * entries:
        return (
            f"{scheme.name} has {entries} entries a table for only {runs} runs of "
            f"{book.vector} columns in {rows} x {columns}"
        )
    if stored > _MOST_OVERHEAD * nominal:
        return (
            f"{scheme.name} takes {stored:.2f} bits a weight in {rows} x {columns} "
            f"for its nominal {nominal:g}: tables and scales outweigh what they save"
        )
    return None


def obstacle(
    scheme: Scheme, shape: tuple[int, int], offered: Sequence[str]
) -> str | None:
    """Return why tables are too large for a matrix, with a remedy, or ``None``.

    Args:
        scheme: As :func:`too_large` takes it.
        shape: Rows and columns.
        offered: Schemes of the method, of which those that would do are named.
    """
    reason = too_large(scheme, shape)
    if reason is None:
        return None
    fitting = [
        other.name
        for other in map(Scheme.parse, offered)
        if other.codebook is not None
        and shape[1] % other.codebook.vector == 0
        and too_large(other.with_scales(scheme.scale_dtype), shape) is None
    ]
    remedy = f"use {' or '.join(fitting)}" if fitting else "keep it dense"
    return f"{reason}; {remedy}, or set allow_large_tables"
