"""A sweep as a table, a figure and a page: bytes against KL, and the front of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from compress.report.html import document, draw, paragraph
from compress.report.plots import captioned
from compress.report.style import STYLE
from compress.report.svg import (
    SERIES,
    Axis,
    element,
    figure,
    frame,
    label,
    line,
    mark_legend,
    marker,
)
from compress.report.tables import Table
from compress.report.terminal import draw_table
from compress.report.wording import (
    MISSING,
    branch,
    count,
    divergence,
    duration,
    nats,
    number_at,
    percent,
    times,
)

Data = Mapping[str, Any]

_WIDTH, _HEIGHT = 480, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 468.0, 26.0, 296.0
_TITLE = "Size against distance to the original"
_NOTE = (
    "Fewer bytes and less KL are better. The dashed line is the front: below and left "
    "of it there is nothing. Points of other tools are hollow."
)


def sweep_text(data: Data) -> str:
    """Return the table that ends a sweep, for a terminal."""
    table = point_table(data)
    notes = [f"WARNING: {text}" for text in _failures(data)]
    return "\n".join([draw_table(table), "", table.caption, *notes])


def point_table(data: Data) -> Table:
    """Return all points, fewest bytes first, those of other tools among them."""
    everything = [*data["points"], *data["foreign"]]
    points = sorted(everything, key=lambda point: float(point["bytes"]))
    headers = (
        *("point", "front", "bytes", "of budget", "KL (nats)", "same top-1"),
        *("perplexity ratio", "predicted KL", "time"),
    )
    rows = [
        (
            str(point["name"]),
            "*" if point.get("on_front") else "",
            count(number_at(point, "bytes")),
            _share(point),
            divergence(point),
            percent(number_at(point, "top1")),
            times(number_at(point, "ppl_ratio")),
            nats(number_at(point, "predicted_kl")),
            duration(number_at(point, "seconds")),
        )
        for point in points
    ]
    kept = [
        index
        for index in range(len(headers))
        if any(row[index] not in (MISSING, "") for row in rows)
    ]
    texts = sorted({str(point["text"]) for point in data["points"]})
    return Table(
        "Points of the sweep",
        tuple(headers[i] for i in kept),
        "".join("llrrrrrrr"[i] for i in kept),
        tuple(tuple(row[i] for i in kept) for row in rows),
        f"KL to the original on: {', '.join(texts)}. Points with a star are on the "
        "front: no other point of the model has no more bytes and less KL. Time is "
        "that of levels, sensitivities and search.",
    )


def _share(point: Data) -> str:
    budget = number_at(point, "budget_bytes")
    size = number_at(point, "bytes")
    return percent(size / budget, 2) if size is not None and budget else MISSING


def render_svg(data: Data) -> str:
    """Return the figure as a file of its own, which follows light and dark."""
    style = element("style", STYLE + "svg { font-family: system-ui, sans-serif; }")
    ground = element("rect", width="100%", height="100%", fill="var(--ground)")
    body = style + ground + _plot(data) + _inner_legend(data)
    drawn = figure(body, width=_WIDTH, height=_HEIGHT, title=_TITLE)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{drawn}\n'


def render_sweep(data: Data) -> str:
    """Return a page of the figure, the table and what the sweep was made with."""
    models = sorted({str(point["model"]) for point in data["points"]})
    drawn = figure(_plot(data), width=_WIDTH, height=_HEIGHT, title=_TITLE)
    names = [name for name, _ in _series(data)]
    key = mark_legend(names, range(len(names)))
    plot = captioned(drawn, _TITLE, note=_NOTE, key=key)
    command = element("code", escape(str(data["command"])))
    versions = ", ".join(f"{k} {v}" for k, v in branch(data, "versions").items())
    body = element(
        "div",
        element(
            "header",
            element("h1", escape(", ".join(models)), ": sweep"),
            paragraph(str(data.get("date") or ""), "soft"),
        ),
        element(
            "main",
            _warnings(data),
            element("div", plot, class_="figures"),
            element("h2", "Points"),
            draw(point_table(data)),
            element("h2", "Provenance"),
            element("pre", command, tabindex=0),
            paragraph(versions, "note"),
        ),
        element("footer", "The same numbers: ", element("code", "sweep.json"), "."),
        class_="wrap",
    )
    return document(f"{', '.join(models)}: sweep", body)


def _failures(data: Data) -> list[str]:
    return [
        f"{point['name']}: {text}"
        for point in data["points"]
        for text in point.get("failures") or []
    ]


def _warnings(data: Data) -> str:
    items = [element("li", escape(text)) for text in _failures(data)]
    if not items:
        return ""
    title = element("h2", "Warnings")
    return element("div", title, element("ul", *items), class_="warnings", role="note")


def _series(data: Data) -> list[tuple[str, list[Data]]]:
    """Return points by what was varied besides the budget; other tools last."""
    found: dict[str, list[Data]] = {}
    for point in data["points"]:
        settings = branch(point, "settings")
        name = ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in settings.items())
        found.setdefault(name or "compress", []).append(point)
    series = list(found.items())
    others = list(data["foreign"])
    name = str(data.get("foreign_name") or "other tools")
    return [*series, (name, others)] if others else series


def _plot(data: Data) -> str:
    series = _series(data)
    points = [point for _, found in series for point in found]
    sizes = [float(point["bytes"]) / 1e6 for point in points]
    margin = 0.06 * (max(sizes) - min(sizes)) or 0.05 * max(sizes)
    x = Axis(max(min(sizes) - margin, 0.0), max(sizes) + margin, _LEFT, _RIGHT)
    y = Axis.over([float(p["kl"]) for p in points], _BOTTOM, _TOP, is_log=True)
    body = frame(x, y, x_label="MB (millions of bytes)", y_label="KL, nats a token")
    for model in dict.fromkeys(str(point["model"]) for point in data["points"]):
        front = [p for p in data["points"] if p["on_front"] and p["model"] == model]
        body += _steps(front, x, y)
    for index, (_, found) in enumerate(series):
        places = [(x.at(p["bytes"] / 1e6), y.at(float(p["kl"]))) for p in found]
        for point, place in zip(found, places, strict=True):
            body += _mark(point, index, place, places)
    return body


def _inner_legend(data: Data) -> str:
    """Return the names of series inside the plot, where its curves never are."""
    body = ""
    for index, (name, _) in enumerate(_series(data)):
        y = _TOP + 14 + 20 * index
        body += label(_RIGHT - 16, y, name, anchor="end", class_="halo")
        body += marker(index % SERIES, _RIGHT - 6, y - 4, scale=1.4)
    return element("g", body, class_="key")


def _steps(front: Sequence[Data], x: Axis, y: Axis) -> str:
    """Return the front as stairs: between two points the smaller one is what fits."""
    places = [(x.at(p["bytes"] / 1e6), y.at(float(p["kl"]))) for p in front]
    places.append((x.end, places[-1][1]))
    return "".join(_stairs(places))


def _stairs(places: Sequence[tuple[float, float]]) -> Iterable[str]:
    for (left, high), (right, low) in zip(places, places[1:], strict=False):
        yield line(left, high, right, high, class_="limit")
        yield line(right, high, right, low, class_="limit")


def _mark(
    point: Data,
    index: int,
    place: tuple[float, float],
    others: Sequence[tuple[float, float]],
) -> str:
    """Return a mark, with a name beside it if it is another tool's."""
    px, py = place
    is_foreign = "model" not in point
    hint = f"{point['name']}: {count(point['bytes'])} bytes, KL {nats(point['kl'])}"
    body = marker(index % SERIES, px, py, hint=hint, hollow=is_foreign, scale=1.4)
    if is_foreign:
        crowded = any(0 < x - px < 60 and abs(y - py) < 16 for x, y in others)
        side = "end" if crowded or px > (_LEFT + _RIGHT) / 2 else "start"
        shift = -7 if side == "end" else 7
        body += label(
            px + shift, py + 4, str(point["name"]), anchor=side, class_="small halo"
        )
    return body
