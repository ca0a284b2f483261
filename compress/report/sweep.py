"""A sweep as a table, figures and a page: bytes, distance and speed, and the front."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from compress.core.sizes import parse_size
from compress.report.front import BITS_PER_BYTE, SPEED, best_that_fit, measure_of
from compress.report.html import document, draw, paragraph
from compress.report.plots import captioned
from compress.report.svg import element, mark_legend
from compress.report.sweep_plots import TITLE, drawn, names_of_series, speed_plot
from compress.report.tables import Table
from compress.report.terminal import ASCII, draw_table
from compress.report.wording import (
    MISSING,
    branch,
    count,
    divergence,
    duration,
    fixed,
    nats,
    number_at,
    percent,
    times,
)

Data = Mapping[str, Any]

_NOTE = (
    "Fewer bytes and less loss are better. The dashed line is the front: below and "
    "left of it there is nothing."
)
_FOREIGN = (
    "Points of other tools are hollow; they have a KL alone, and are in the table only "
    "where models are compared by bits per byte."
)
_TIMED = (
    " Speed is that of writing one token at a time in llama.cpp on this machine's CPU, "
    "in turns with an unquantized float16 file of the model; differences within the "
    "spread of three rounds, of which ± is half, count as none."
)
_SPEED_NOTE = (
    "Up and left is better: faster and closer. Tokens a second of writing one at a "
    "time in llama.cpp on the CPU of this machine."
)


def sweep_text(data: Data) -> str:
    """Return the table that ends a sweep, for a terminal."""
    table = point_table(data)
    said = [text.translate(ASCII) for text in answers(data)]
    notes = [*said, *(f"WARNING: {text}" for text in _failures(data))]
    return "\n".join([draw_table(table), "", table.caption, *notes])


def answers(data: Data) -> list[str]:
    """Return a sentence on each size of ``fits``: which point to take for it."""
    found = []
    for size in branch(data, "config").get("fits") or []:
        best = best_that_fit(data["points"], parse_size(str(size)))
        found += [f"{size}: {_described(point)}" for point in best]
        if not best:
            smallest = min(int(point["bytes"]) for point in data["points"])
            found.append(
                f"{size}: no point is that small; the smallest has "
                f"{count(smallest)} bytes"
            )
    return found


def _described(point: Data) -> str:
    about = [f"{count(number_at(point, 'bytes'))} bytes", f"KL {divergence(point)}"]
    bits, speed = number_at(point, BITS_PER_BYTE), number_at(point, SPEED)
    if bits is not None:
        about.append(f"{fixed(bits, 4)} bits per byte")
    if speed is not None:
        ratio = times(number_at(point, "times_original"), 2)
        beside = f" ({ratio} the original's)" if ratio != MISSING else ""
        about.append(f"{fixed(speed, 1)} tokens/s{beside}")
    return f"take {point['name']} ({point['model']}): {', '.join(about)}"


def point_table(data: Data) -> Table:
    """Return all points, fewest bytes first, those of other tools among them."""
    everything = [*data["points"], *data["foreign"], *originals(data)]
    points = sorted(everything, key=lambda point: float(point["bytes"]))
    headers = (
        *("point", "front", "bytes", "of budget", "KL (nats)", "same top-1"),
        *("perplexity ratio", "bits per byte", "tokens/s", "of original"),
        *("predicted KL", "time"),
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
            fixed(number_at(point, BITS_PER_BYTE), 4),
            _speed(point),
            times(number_at(point, "times_original"), 2),
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
    return Table(
        "Points of the sweep",
        tuple(headers[i] for i in kept),
        "".join("llrrrrrrrrrr"[i] for i in kept),
        tuple(tuple(row[i] for i in kept) for row in rows),
        _caption(data),
    )


def _speed(point: Data) -> str:
    """Return tokens a second, and half the spread of the rounds where it is known."""
    half = number_at(point, f"{SPEED}_spread")
    shown = fixed(number_at(point, SPEED), 1)
    return shown if half is None else f"{shown} ± {half / 2:.1f}"


def _caption(data: Data) -> str:
    points = data["points"]
    texts = sorted({str(point["text"]) for point in points})
    models = {point["model"] for point in points}
    what = "bits per byte" if measure_of(points) == BITS_PER_BYTE else "KL"
    among = (
        "no other point"
        if len(models) == 1 or what != "KL"
        else ("no other point of the model")
    )
    speed = ", and is no slower" if any(SPEED in point for point in points) else ""
    return (
        f"KL to the original on: {', '.join(texts)}. Points with a star are on the "
        f"front: {among} has no more bytes and less {what}{speed}. Time is that of the "
        "whole point; what the cache had already took none." + (_TIMED if speed else "")
    )


def originals(data: Data) -> list[dict[str, Any]]:
    """Return the models that the points come from, where they were measured."""
    found: dict[str, dict[str, Any]] = {}
    for point in data["points"]:
        if point.get("original"):
            found[str(point["model"])] = dict(point["original"])
    for name, about in found.items():
        rates = [
            rate
            for point in data["points"]
            if point["model"] == name
            and (rate := number_at(point, "original_tokens_per_second")) is not None
        ]
        if rates:
            about[SPEED] = statistics.median(rates)
    return [{"name": f"original {name}", **about} for name, about in found.items()]


def _share(point: Data) -> str:
    budget = number_at(point, "budget_bytes")
    size = number_at(point, "bytes")
    return percent(size / budget, 2) if size is not None and budget else MISSING


def render_sweep(data: Data) -> str:
    """Return a page of the figures, the table and what the sweep was made with."""
    models = sorted({str(point["model"]) for point in data["points"]})
    names = names_of_series(data)
    key = mark_legend(names, range(len(names)))
    note = f"{_NOTE} {_FOREIGN}" if data["foreign"] else _NOTE
    plots = [captioned(drawn(data), TITLE, note=note, key=key)]
    speeds = speed_plot(data)
    if speeds:
        plots.append(captioned(speeds, "Speed against loss", note=_SPEED_NOTE, key=key))
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
            _answers(data),
            element("div", *plots, class_="figures"),
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


def _answers(data: Data) -> str:
    items = [element("li", escape(text)) for text in answers(data)]
    return element("h2", "What fits") + element("ul", *items) if items else ""


def _failures(data: Data) -> list[str]:
    return [
        f"{point['name']}: {text}"
        for point in data["points"]
        for text in point.get("failures") or []
    ]


def _warnings(data: Data) -> str:
    failures: Sequence[str] = _failures(data)
    if data.get("is_complete") is False:
        failures = ["The sweep is not finished: points are missing.", *failures]
    items = [element("li", escape(text)) for text in failures]
    if not items:
        return ""
    title = element("h2", "Warnings")
    return element("div", title, element("ul", *items), class_="warnings", role="note")
