"""Which points of a sweep are worth taking: the Pareto front, and what fits a size.

A point is dominated if another one is no larger, no worse and no slower, and better in
one of the three; speed counts where every point has one, and two that differ by no more
than the larger spread of their own rounds are alike. Distance to the original (KL)
compares points of one model. Points of several models are compared by bits per byte of
the same text, which no tokenizer changes; without that each model has its own front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.report.wording import number_at

Point = Mapping[str, Any]

KL, BITS_PER_BYTE, SPEED = "kl", "bits_per_byte", "tokens_per_second"


def measure_of(points: Sequence[Point]) -> str:
    """Return the key that says how bad a point is: ``kl`` or ``bits_per_byte``."""
    models = {point["model"] for point in points}
    texts = {point.get("text") for point in points}
    known = all(number_at(point, BITS_PER_BYTE) is not None for point in points)
    return BITS_PER_BYTE if len(models) > 1 and len(texts) == 1 and known else KL


def with_front(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return the points, fewest bytes first, each with ``on_front``.

    Of equal points the first is on the front.
    """
    key = measure_of(points)
    timed = all(number_at(point, SPEED) is not None for point in points)
    ordered = sorted(points, key=lambda point: (point["bytes"], point[key]))
    found: list[dict[str, Any]] = []
    for index, point in enumerate(ordered):
        rivals = [
            (place, other)
            for place, other in enumerate(ordered)
            if place != index and (key != KL or other["model"] == point["model"])
        ]
        beaten = any(
            _beats(other, point, key, timed=timed, is_first=place < index)
            for place, other in rivals
        )
        found.append({**point, "on_front": not beaten})
    return found


def staircase(points: Sequence[Point], key: str) -> list[Point]:
    """Return the points that nothing smaller beats in ``key``, fewest bytes first."""
    best, found = float("inf"), []
    for point in sorted(points, key=lambda p: (p["bytes"], p[key])):
        if point[key] < best:
            best = point[key]
            found.append(point)
    return found


def best_that_fit(points: Sequence[Point], size_bytes: float) -> list[Point]:
    """Return the best point that is no larger than a size.

    It is one, or one of each model where nothing compares the models.
    """
    key = measure_of(points)
    best: dict[str, Point] = {}
    for point in sorted(points, key=lambda p: (p[key], p["bytes"])):
        if point["bytes"] <= size_bytes:
            best.setdefault(str(point["model"]) if key == KL else "", point)
    return list(best.values())


def _beats(a: Point, b: Point, key: str, *, timed: bool, is_first: bool) -> bool:
    """Whether ``a`` dominates ``b``, or stands for both because it comes first."""
    costs = [(float(a[name]), float(b[name])) for name in ("bytes", key)]
    no_worse = all(x <= y for x, y in costs)
    better = any(x < y for x, y in costs)
    if timed:
        gap = float(a[SPEED]) - float(b[SPEED])
        slack = max(float(point.get(f"{SPEED}_spread") or 0) for point in (a, b))
        no_worse, better = no_worse and gap >= -slack, better or gap > slack
    return no_worse and (better or is_first)
