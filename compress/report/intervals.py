"""Figures of paired data in words: with intervals, and stars where significant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from compress.report.wording import MISSING, branch, number_at, percent, times

Row = Mapping[str, Any]

_STAR = "*"


def accuracy(row: Row) -> str:
    """Return the accuracy of a task with its standard error, if it has them."""
    share, error = number_at(row, "accuracy"), number_at(row, "accuracy_se")
    if share is None:
        return MISSING
    return percent(share) if error is None else _with_error(share, error)


def _with_error(share: float, error: float) -> str:
    return f"{100 * share:.1f} ± {100 * error:.1f} %"


def p_value(row: Row) -> str:
    """Return McNemar's p of a task, starred if it is significant."""
    p = number_at(row, "p")
    if p is None:
        return MISSING
    shown = f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"
    return shown + (_STAR if row.get("significant") else "")


def points(row: Row) -> str:
    """Return the difference of accuracy from the base's, in points."""
    return starred(row, "accuracy_difference", in_points)


def difference_in_bits(row: Row) -> str:
    """Return the rise of the right answer's bits per byte over the base's."""
    return starred(row, "bits_per_byte_difference", signed)


def starred(row: Row, key: str, write: Callable[[float], str]) -> str:
    """Return a value with its interval under a key, starred if it is significant."""
    interval = branch(row, key)
    star = _STAR if interval.get("significant") else ""
    return ranged(interval, write) + star


def ranged(interval: Row, write: Callable[[float], str]) -> str:
    """Return a value with the ends of its interval, where it has any."""
    value, low, high = (number_at(interval, k) for k in ("value", "low", "high"))
    if value is None:
        return MISSING
    if low is None or high is None:
        return write(value)
    ends = (write(end).removeprefix("×") for end in (low, high))
    return f"{write(value)} [{', '.join(ends)}]"


def as_factor(ratio: float) -> str:
    """Return a ratio."""
    return times(ratio)


def in_points(share: float) -> str:
    """Return a difference of shares in points."""
    return f"{round(100 * share, 1) + 0.0:+.1f}"  # no -0.0


def signed(value: float) -> str:
    """Return a difference with its sign."""
    return f"{value:+.3f}"


def signed_nats(value: float) -> str:
    """Return a difference of divergences with its sign."""
    return f"{value:+.4f}"
