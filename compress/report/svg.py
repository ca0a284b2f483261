"""SVG elements, axes and legends: just what the figures of the report need.

Colours come from the page's style sheet by class (``s0`` to ``s7``), so that figures
follow light and dark. Series also differ by marker and dash, never by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

SERIES = 8

# Centred on the origin, about seven units wide.
_MARKERS = (
    "M-3,0A3,3 0 1 0 3,0A3,3 0 1 0 -3,0Z",
    "M-2.7,-2.7H2.7V2.7H-2.7Z",
    "M0,-3.6L3.4,2.6H-3.4Z",
    "M0,-3.8L3.8,0L0,3.8L-3.8,0Z",
    "M0,3.6L3.4,-2.6H-3.4Z",
    "M-3.4,-1.2H-1.2V-3.4H1.2V-1.2H3.4V1.2H1.2V3.4H-1.2V1.2H-3.4Z",
    "M-4,-1.3H4V1.3H-4Z",
    "M-1.3,-4H1.3V4H-1.3Z",
)
_DASHES = ("", "6 2", "2 2", "7 2 2 2", "", "5 4", "1 3", "9 3")


def element(name: str, *children: str, **attributes: object) -> str:
    """Return one element; a trailing ``_`` is dropped and ``_`` inside becomes ``-``.

    Children are markup already; attribute values are escaped here.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for key, value in attributes.items()
        if value not in (None, "")
    )
    return f"<{name}{written}>{''.join(children)}</{name}>"


def _value(value: object) -> str:
    return (
        f"{value:.2f}".rstrip("0").rstrip(".")
        if isinstance(value, float)
        else str(value)
    )


def label(
    x: float, y: float, text: str, *, anchor: str = "start", class_: str = ""
) -> str:
    """Return escaped text with its baseline at ``y``."""
    return element("text", escape(text), x=x, y=y, text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, *, class_: str) -> str:
    """Return a straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def tooltip(text: str) -> str:
    """Return what a pointer sees over the enclosing element."""
    return element("title", escape(text))


def marker(
    series: int,
    x: float,
    y: float,
    *,
    hint: str = "",
    hollow: bool = False,
    scale: float = 1.0,
) -> str:
    """Return the mark of a series at a point."""
    return element(
        "path",
        tooltip(hint) if hint else "",
        d=_MARKERS[series % SERIES],
        transform=f"translate({x:.1f} {y:.1f}) scale({scale:g})",
        class_=f"mark s{series % SERIES}" + (" hollow" if hollow else ""),
    )


def polyline(series: int, points: Iterable[tuple[float, float]]) -> str:
    """Return the line of a series through ``points``."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return element(
        "polyline",
        points=path,
        class_=f"trace s{series % SERIES}",
        stroke_dasharray=_DASHES[series % SERIES],
    )


def figure(body: str, *, width: int, height: int, title: str) -> str:
    """Return a complete SVG that scales to its container, with a name for readers."""
    return element(
        "svg",
        body,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=title,
        xmlns="http://www.w3.org/2000/svg",
    )


def legend(names: Sequence[str]) -> str:
    """Return an HTML list of series, which wraps where the page is narrow."""
    items = []
    for index, name in enumerate(names):
        sample = polyline(index, [(0, 6), (26, 6)]) + marker(index, 13, 6)
        picture = element("svg", sample, viewBox="0 0 26 12", aria_hidden="true")
        items.append(element("li", picture, escape(name)))
    return element("ul", *items, class_="legend")


def mark_legend(names: Sequence[str], marks: Sequence[int]) -> str:
    """Return an HTML list of the marks of series that have no line."""
    items = []
    for name, mark in zip(names, marks, strict=True):
        drawn = marker(mark, 6, 6, scale=1.5)
        picture = element("svg", drawn, viewBox="0 0 12 12", aria_hidden="true")
        items.append(element("li", picture, escape(name)))
    return element("ul", *items, class_="legend marks")


@dataclass(frozen=True)
class Axis:
    """A map from values to positions.

    Attributes:
        low: Value at ``start``; above zero on a logarithmic axis.
        high: Value at ``end``; larger than ``low``.
        start: Position of ``low``.
        end: Position of ``high``.
        is_log: Whether decades are equally long.
        least_step: Smallest distance of ticks; 1 where values are whole numbers.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False
    least_step: float = 0.0

    @classmethod
    def over(
        cls, values: Iterable[float], start: float, end: float, *, is_log: bool = False
    ) -> Axis:
        """Return an axis that holds all ``values``, with some room around them.

        A logarithmic axis ignores what lies outside of 1e-12 to 1e12: no error of a
        layer means anything there, and a stray value would flatten all the others.
        """
        if not is_log:
            high = max([*values, 0.0]) or 1.0
            step = _step(high)
            return cls(0.0, math.ceil(high / step - 1e-9) * step, start, end)
        found = [v for v in values if 1e-12 <= v <= 1e12] or [0.1, 1.0]
        return cls(min(found) / 1.2, max(found) * 1.2, start, end, True)

    def at(self, value: float) -> float:
        """Return the position of ``value``, kept inside the axis."""
        value = min(max(value, self.low), self.high)
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Return round values inside the axis with their labels."""
        if not self.is_log:
            step = max(_step(self.high - self.low), self.least_step)
            lowest = math.ceil(self.low / step - 1e-9)
            highest = math.floor(self.high / step + 1e-9)
            return [(i * step, f"{i * step:.6g}") for i in range(lowest, highest + 1)]
        first, last = math.log10(self.low), math.log10(self.high)
        decades = range(math.floor(first), math.ceil(last) + 1)
        every = max(1, math.ceil((last - first) / 6))
        factors: tuple[float, ...] = (1.0,) if last - first > 2.2 else (1.0, 2.0, 5.0)
        if last - first < 0.8:
            factors = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
        values = [f * 10.0**d for d in decades if d % every == 0 for f in factors]
        inside = [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]
        return [(v, f"{v:.0e}" if v < 1e-4 else f"{v:.6g}") for v in inside]


def _step(high: float) -> float:
    """Return the round step that makes three to six intervals up to ``high``."""
    raw = high / 6
    power = 10.0 ** math.floor(math.log10(raw))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999)


def frame(x: Axis, y: Axis, *, x_label: str, y_label: str) -> str:
    """Return grid lines, tick labels and axis names around a plot."""
    parts = []
    for value, text in y.ticks():
        parts.append(line(x.start, y.at(value), x.end, y.at(value), class_="grid"))
        parts.append(label(x.start - 6, y.at(value) + 4, text, anchor="end"))
    for value, text in x.ticks():
        parts.append(
            line(x.at(value), y.start, x.at(value), y.start + 4, class_="axis")
        )
        parts.append(label(x.at(value), y.start + 18, text, anchor="middle"))
    parts.append(line(x.start, y.start, x.end, y.start, class_="axis"))
    middle = (x.start + x.end) / 2
    parts.append(label(middle, y.start + 37, x_label, anchor="middle", class_="name"))
    parts.append(label(2, y.end - 12, y_label, class_="name"))
    return "".join(parts)
