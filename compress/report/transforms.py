"""The table of exact transforms: what they changed, and what the search gained."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from compress.report.tables import Report, Table
from compress.report.wording import MISSING, count, fixed, number_at, percent

_HEADERS = (
    "transform",
    "place",
    "places",
    "changed",
    "median alpha",
    "median gain",
    "best gain",
)
_CAPTION = (
    "Exact: none of this changes an output before rounding. Gain is the share of the "
    "error of rounding to nearest that the scales take away, on the calibration text; "
    "report.json has every place."
)


def transform_table(report: Report) -> Table:
    """Return what each transform changed, by kind of place."""
    rows: list[tuple[str, ...]] = []
    for transform in report.get("transforms") or []:
        name = str(transform.get("name"))
        kinds: dict[str, list[Report]] = {}
        for place in transform.get("places") or []:
            kinds.setdefault(str(place.get("kind")), []).append(place)
        if not kinds:
            rows.append((name, "whole model", *[MISSING] * 5))
        rows += [(name, kind, *_facts(places)) for kind, places in kinds.items()]
    caption = _CAPTION if rows else ""
    return Table("Transforms", _HEADERS, "llrrrrr", tuple(rows), caption)


def _facts(places: list[Report]) -> tuple[str, ...]:
    alphas = _numbers(places, "alpha")
    gains = _numbers(places, "gain")
    return (
        count(len(places)),
        count(sum(1 for place in places if place.get("changed"))),
        fixed(statistics.median(alphas) if alphas else None),
        percent(statistics.median(gains) if gains else None),
        percent(max(gains) if gains else None),
    )


def _numbers(places: Iterable[Report], key: str) -> list[float]:
    found = (number_at(place, key) for place in places)
    return [value for value in found if value is not None]
