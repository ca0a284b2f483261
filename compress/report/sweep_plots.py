"""The figures of a sweep: bytes against loss with the front, and speed against loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compress.report.front import BITS_PER_BYTE, KL, SPEED, measure_of, staircase
from compress.report.style import STYLE
from compress.report.svg import (
    SERIES,
    Axis,
    element,
    figure,
    frame,
    label,
    line,
    marker,
)
from compress.report.wording import branch, count, fixed, nats, number_at

Data = Mapping[str, Any]
Place = tuple[float, float]

TITLE = "Size against loss"
_WIDTH, _HEIGHT = 480, 340
_LEGEND_ROW = 20
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 468.0, 26.0, 296.0
NAMED = {KL: "KL, nats a token", BITS_PER_BYTE: "bits per byte"}


def render_svg(data: Data) -> str:
    """Return the figure as a file of its own, which follows light and dark."""
    style = element("style", STYLE + "svg { font-family: system-ui, sans-serif; }")
    ground = element("rect", width="100%", height="100%", fill="var(--ground)")
    body = style + ground + _plot(data) + _legend_below(data)
    rows = -(-len(names_of_series(data)) // 2)
    height = _HEIGHT + _LEGEND_ROW * rows + 6
    svg = figure(body, width=_WIDTH, height=height, title=TITLE)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{svg}\n'


def drawn(data: Data) -> str:
    """Return bytes against loss for a page, whose key stands beside it."""
    return figure(_plot(data), width=_WIDTH, height=_HEIGHT, title=TITLE)


def speed_plot(data: Data) -> str:
    """Return speed against loss; ``''`` where no point was timed."""
    series = [
        (index, [p for p in found if number_at(p, SPEED) is not None])
        for index, (_, found) in enumerate(series_of(data))
    ]
    points = [point for _, found in series for point in found]
    if not points:
        return ""
    key = measure_of(data["points"])
    x = _loss_axis([float(p[key]) for p in points], key, _LEFT, _RIGHT)
    y = Axis.over([float(p[SPEED]) for p in points], _BOTTOM, _TOP)
    body = frame(x, y, x_label=NAMED[key], y_label="tokens a second")
    for index, found in series:
        for point in found:
            place = x.at(float(point[key])), y.at(float(point[SPEED]))
            body += marker(index, *place, hint=_hint(point, key), scale=1.4)
    return figure(body, width=_WIDTH, height=_HEIGHT, title="Speed against loss")


def names_of_series(data: Data) -> list[str]:
    """Return what the marks mean, in the order of their shapes."""
    return [name for name, _ in series_of(data)]


def series_of(data: Data) -> list[tuple[str, list[Data]]]:
    """Return points by what was varied besides the size; other tools last."""
    found: dict[str, list[Data]] = {}
    mixed = {_is_searched(point) for point in data["points"]} == {True, False}
    for point in data["points"]:
        words = [_said(k, v) for k, v in branch(point, "settings").items()]
        if mixed:
            words.append("budget" if _is_searched(point) else "one scheme")
        found.setdefault(", ".join(words) or "compress", []).append(point)
    series = list(found.items())
    key = measure_of(data["points"])
    others = [point for point in data["foreign"] if number_at(point, key) is not None]
    name = str(data.get("foreign_name") or "other tools")
    return [*series, (name, others)] if others else series


def _is_searched(point: Data) -> bool:
    return point.get("budget_bytes") is not None


def _said(key: str, value: object) -> str:
    if key == "model.path":
        return str(value).rstrip("/").rpartition("/")[2]
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{key.rpartition('.')[2]} {shown}"


def _plot(data: Data) -> str:
    series, key = series_of(data), measure_of(data["points"])
    points = [point for _, found in series for point in found]
    sizes = [float(point["bytes"]) / 1e6 for point in points]
    margin = 0.06 * (max(sizes) - min(sizes)) or 0.05 * max(sizes)
    x = Axis(max(min(sizes) - margin, 0.0), max(sizes) + margin, _LEFT, _RIGHT)
    y = _loss_axis([float(p[key]) for p in points], key, _BOTTOM, _TOP)
    body = frame(x, y, x_label="MB (millions of bytes)", y_label=NAMED[key])
    for group in comparable(data["points"], key):
        places = [_place(point, key, x, y) for point in staircase(group, key)]
        body += "".join(_stairs([*places, (x.end, places[-1][1])]))
    for index, (_, found) in enumerate(series):
        places = [_place(point, key, x, y) for point in found]
        for point, place in zip(found, places, strict=True):
            body += _mark(point, index, place, places, key)
    return body


def comparable(points: Sequence[Data], key: str) -> list[list[Data]]:
    """Return the points that compare with one another: all, or those of a model."""
    found: dict[str, list[Data]] = {}
    for point in points:
        found.setdefault(str(point["model"]) if key == KL else "", []).append(point)
    return list(found.values())


def _loss_axis(values: Sequence[float], key: str, start: float, end: float) -> Axis:
    """Return decades for KL, which spans several, and a plain axis for bits a byte."""
    if key == KL:
        return Axis.over(values, start, end, is_log=True)
    margin = 0.06 * (max(values) - min(values)) or 0.05 * max(values)
    return Axis(min(values) - margin, max(values) + margin, start, end)


def _place(point: Data, key: str, x: Axis, y: Axis) -> Place:
    return x.at(float(point["bytes"]) / 1e6), y.at(float(point[key]))


def _legend_below(data: Data) -> str:
    """Return the names of series below the plot, two in a row."""
    body = ""
    for index, name in enumerate(names_of_series(data)):
        x = 14 + index % 2 * _WIDTH / 2
        y = _HEIGHT + _LEGEND_ROW * (index // 2) + 14
        body += marker(index % SERIES, x, y - 4, scale=1.4)
        body += label(x + 10, y, name)
    return element("g", body, class_="key")


def _stairs(places: Sequence[Place]) -> Iterable[str]:
    """Yield the front: between two points the smaller one is what fits."""
    for (left, high), (right, low) in zip(places, places[1:], strict=False):
        yield line(left, high, right, high, class_="limit")
        yield line(right, high, right, low, class_="limit")


def _hint(point: Data, key: str) -> str:
    loss = number_at(point, key)
    said = f"KL {nats(loss)}" if key == KL else f"{fixed(loss, 4)} bits per byte"
    speed = number_at(point, SPEED)
    rate = "" if speed is None else f", {fixed(speed, 1)} tokens/s"
    return f"{point['name']}: {count(number_at(point, 'bytes'))} bytes, {said}{rate}"


def _mark(
    point: Data, index: int, place: Place, others: Sequence[Place], key: str
) -> str:
    """Return a mark, with a name beside it if it is another tool's."""
    px, py = place
    is_foreign = "model" not in point
    hint = _hint(point, key)
    body = marker(index % SERIES, px, py, hint=hint, hollow=is_foreign, scale=1.4)
    if is_foreign:
        crowded = any(0 < x - px < 60 and abs(y - py) < 16 for x, y in others)
        side = "end" if crowded or px > (_LEFT + _RIGHT) / 2 else "start"
        shift = -7 if side == "end" else 7
        body += label(
            px + shift, py + 4, str(point["name"]), anchor=side, class_="small halo"
        )
    return body
