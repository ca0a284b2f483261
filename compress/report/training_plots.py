"""Figures of training: the distance to the original over the steps of a stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.report.plots import captioned
from compress.report.svg import (
    Axis,
    figure,
    frame,
    label,
    legend,
    line,
    marker,
    polyline,
)
from compress.report.wording import count, duration, nats, number_at

_WIDTH, _HEIGHT = 480, 252
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 468.0, 26.0, 208.0
_SERIES = {"kl": "held-out KL", "loss": "training loss"}


def training_plot(record: Mapping[str, Any], *, title: str) -> str:
    """Return held-out KL and training loss of one stage; or ``''`` before two points.

    Args:
        record: ``recovery`` or ``tuning`` of ``report.json``.
        title: Name of the stage.
    """
    curves = {key: _points(record, key) for key in _SERIES}
    if len(curves["kl"]) < 2:
        return ""
    x = Axis(0.0, max(step for step, _, _ in curves["kl"]) or 1.0, _LEFT, _RIGHT)
    values = [value for points in curves.values() for _, value, _ in points]
    y = Axis.over(values, _BOTTOM, _TOP, is_log=True)
    body = frame(x, y, x_label="step", y_label="nats a token")
    body += _best(record, curves["kl"], x, y)
    for index, (key, points) in enumerate(curves.items()):
        body += polyline(index, [(x.at(step), y.at(v)) for step, v, _ in points])
        for step, value, seconds in points:
            hint = f"step {count(step)}, {duration(seconds)}: {_SERIES[key]} "
            hint += nats(value)
            body += marker(index, x.at(step), y.at(value), hint=hint)
    name = f"{title} by {str(record.get('method')).replace('_', ' ')}"
    svg = figure(body, width=_WIDTH, height=_HEIGHT, title=f"Curves of {name}")
    names = [_SERIES[key] for key, points in curves.items() if points]
    note = (
        "Held-out KL: to the original, on windows that were not trained on. The dashed "
        "line is the step that was kept."
    )
    if len(names) > 1:
        note += " The training loss is a mean since the point before."
    return captioned(svg, name, note=note, key=legend(names))


def _points(
    record: Mapping[str, Any], key: str
) -> list[tuple[float, float, float | None]]:
    """Return step, value and seconds of each evaluation that has the value."""
    return [
        (step, value, number_at(entry, "seconds"))
        for entry in record.get("evaluations") or []
        if (step := number_at(entry, "step")) is not None
        and (value := number_at(entry, key)) is not None
        and value > 0
    ]


def _best(
    record: Mapping[str, Any],
    points: list[tuple[float, float, float | None]],
    x: Axis,
    y: Axis,
) -> str:
    """Return the step that was kept as a labelled line."""
    best = number_at(record, "best_step")
    kept = [value for step, value, _ in points if step == best]
    if best is None or not kept:
        return ""
    place = x.at(best)
    is_left = place > (x.start + x.end) / 2
    said = label(
        place - 5 if is_left else place + 5,
        y.end + 10,
        f"kept: {nats(kept[0])}",
        anchor="end" if is_left else "start",
        class_="small halo",
    )
    return line(place, y.end, place, y.start, class_="limit") + said
