"""The outcome of a benchmark as a page with plots, and as JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from compress.bench.tables import ratio_to_bf16, series_of, speed_points, tables_of
from compress.report.html import document, draw, paragraph
from compress.report.plots import captioned
from compress.report.svg import (
    Axis,
    element,
    figure,
    frame,
    legend,
    marker,
    polyline,
)
from compress.report.terminal import draw_table
from compress.report.wording import plain_data
from compress.workdir import write_atomically

Data = Mapping[str, Any]
Series = Mapping[str, list[tuple[float, float]]]

_WIDTH, _HEIGHT = 480, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 468.0, 26.0, 296.0


def as_text(data: Data) -> str:
    """Return the tables of a benchmark for a terminal."""
    drawn = [f"{draw_table(t)}\n\n{t.caption}" for t in tables_of(data) if t.rows]
    notes = [f"WARNING: {k}: {v}" for k, v in (data.get("errors") or {}).items()]
    return "\n\n".join([*drawn, *notes])


def write(data: Data, folder: Path) -> list[Path]:
    """Write a benchmark as JSON and as a page.

    Args:
        data: The outcome.
        folder: Made if it is not there.

    Returns:
        The files: ``bench-KIND.json`` and ``bench-KIND.html``.
    """
    stem = f"bench-{data['kind']}"
    content = json.dumps(plain_data(data), indent=1).encode()
    written = {f"{stem}.json": content, f"{stem}.html": as_page(data).encode()}
    for name, bytes_ in written.items():
        write_atomically(folder / name, bytes_)
    return [folder / name for name in written]


def as_page(data: Data) -> str:
    """Return a page of plots, tables and provenance; it fetches nothing."""
    what = data.get("model") or data.get("device")
    title = f"{what}: {data['kind']}"
    drawn = [element("h2", escape(t.title)) + draw(t) for t in tables_of(data)]
    versions = ", ".join(f"{k} {v}" for k, v in data["versions"].items())
    protocol = json.dumps(plain_data(data["protocol"]), indent=1)
    clocks = [text for text in data.get("clocks") or [] if text]
    body = element(
        "div",
        element("header", element("h1", escape(title))),
        element(
            "main",
            element("div", *plots(data), class_="figures"),
            *drawn,
            element("h2", "Protocol"),
            element("pre", escape(protocol), tabindex=0),
            *(paragraph(f"nvidia-smi: {text}", "note") for text in clocks),
            paragraph(versions, "note"),
        ),
        class_="wrap",
    )
    return document(title, body)


def plots(data: Data) -> list[str]:
    """Return the figures of a benchmark."""
    if data["kind"] == "model":
        points = {name: found for name, found in speed_points(data).items() if found}
        note = "Generated tokens a second of all sequences together."
        return [_plot("Decoding", points, "sequences", "tokens/s", note)]
    rows = data["rows"]
    tokens = sorted({row["tokens"] for row in rows})
    ratios: dict[str, list[tuple[float, float]]] = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        if name == "bf16" or name.endswith("alone"):
            continue
        found = [(m, ratio_to_bf16(rows, name, m)) for m in tokens]
        known = [(m, ratio) for m, ratio in found if ratio is not None]
        if known:
            ratios[name] = known
    note = "Geometric mean over shapes; inputs are rounded in the time."
    drawn = [_plot("Times faster than bf16", ratios, "tokens M", "x bf16", note)]
    for shape in dict.fromkeys((row["rows"], row["columns"]) for row in rows):
        series = series_of(rows, shape)
        title = f"{shape[0]} x {shape[1]}"
        if series:
            drawn.append(_plot(title, series, "tokens M", "microseconds", ""))
    return drawn


def _plot(title: str, series: Series, x_label: str, y_label: str, note: str) -> str:
    """Return lines of series over two logarithmic axes."""
    points = [point for found in series.values() for point in found]
    x = Axis.over([p[0] for p in points], _LEFT, _RIGHT, is_log=True)
    y = Axis.over([p[1] for p in points], _BOTTOM, _TOP, is_log=True)
    body = frame(x, y, x_label=x_label, y_label=y_label)
    for index, (name, found) in enumerate(series.items()):
        places = [(x.at(a), y.at(b)) for a, b in found]
        body += polyline(index, places)
        for (a, b), place in zip(found, places, strict=True):
            body += marker(index, *place, hint=f"{name}, {a:g}: {b:.4g} {y_label}")
    drawn = figure(body, width=_WIDTH, height=_HEIGHT, title=title)
    return captioned(drawn, title, note=note, key=legend(list(series)))
