"""The figures of the report as inline SVG: sizes, errors of layers, divergence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from html import escape
from typing import Any

from compress.report.svg import (
    Axis,
    element,
    figure,
    frame,
    label,
    legend,
    line,
    mark_legend,
    marker,
    polyline,
    tooltip,
)
from compress.report.wording import (
    GRADE_LIMITS,
    branch,
    nats,
    number_at,
    percent,
    significant,
    size,
    text_name,
)

Report = Mapping[str, Any]

_WIDTH = 480
_LEFT, _RIGHT = 62.0, 468.0
_PARTS = ("embedding", "attention", "mlp", "other")
ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
_QUANTILES = {"kl_median": "median", "kl_p90": "90 %", "kl_p99": "99 %"}


def captioned(svg: str, title: str, *, note: str = "", key: str = "") -> str:
    """Return the figure with its title above and its key and note below."""
    heading = element("figcaption", escape(title))
    foot = element("p", escape(note), class_="note") if note else ""
    return element("figure", heading, svg, key, foot)


def size_plot(report: Report) -> str:
    """Return bars of bytes by part, for the base and each export; or ``''``."""
    found = branch(report, "size_breakdown")
    sizes = {
        name: {part: number_at(branch(found, name), part) or 0.0 for part in _PARTS}
        for name in found
    }
    totals = {name: sum(parts.values()) for name, parts in sizes.items()}
    widest = max(totals.values(), default=0.0)
    if widest <= 0:
        return ""
    body, y = "", 4.0
    for name, parts in sizes.items():
        body += _bar(name, parts, y, widest=widest, base=totals.get("base"))
        y += 58
    title = "Where the bytes are"
    svg = figure(body, width=_WIDTH, height=round(y), title=title)
    items = [
        element("li", element("i", class_=f"swatch p{i}"), part)
        for i, part in enumerate(_PARTS)
    ]
    return captioned(svg, title, key=element("ul", *items, class_="legend"))


def _bar(
    name: str,
    parts: Mapping[str, float],
    y: float,
    *,
    widest: float,
    base: float | None,
) -> str:
    """Return one stacked bar with its name and total above it."""
    total = sum(parts.values())
    share = f" ({percent(total / base)})" if base and name != "base" else ""
    body = label(0, y + 14, name, class_="name")
    body += label(_WIDTH, y + 14, f"{size(total)}{share}", anchor="end")
    x = 0.0
    for index, (part, bytes_) in enumerate(parts.items()):
        width = _WIDTH * bytes_ / widest
        of_total = percent(bytes_ / total if total else 0)
        hint = f"{name}, {part}: {size(bytes_)} ({of_total})"
        body += element(
            "rect",
            tooltip(hint),
            x=x,
            y=y + 21,
            width=max(width - 1.0, 0.0),
            height=24,
            class_=f"p{index}",
        )
        if width > 44:
            body += label(
                x + width / 2,
                y + 37.5,
                f"{bytes_ / total:.0%}",
                anchor="middle",
                class_=f"inside t{index}",
            )
        x += width
    return body


def layer_plot(report: Report, key: str, *, title: str, note: str) -> str:
    """Return the error of each layer by block, one series a role, on a log axis.

    Layers that share block and role (experts) are drawn as their geometric mean. An
    error of exactly zero has no logarithm: it is a hollow mark on the lower edge.

    Args:
        report: The report.
        key: ``error`` or ``weight_error``.
        title: Heading of the figure.
        note: What the number means.

    Returns:
        HTML, or ``''`` when no layer of a block has an error above zero.
    """
    series = by_role(report, key)
    values = [v for points in series.values() for v in points.values()]
    if not any(value > 0 for value in values):
        return ""
    blocks = [block for points in series.values() for block in points]
    x = Axis(0, max(*blocks, 1), _LEFT, _RIGHT, least_step=1)
    y = Axis.over(values, 258, 26, is_log=True)
    body = frame(x, y, x_label="block", y_label=key.replace("_", " "))
    for index, (role, points) in enumerate(series.items()):
        placed = [(x.at(block), y.at(value)) for block, value in points.items()]
        body += polyline(index, placed)
        for (block, value), (px, py) in zip(points.items(), placed, strict=True):
            hint = f"block {block}, {role}: {significant(value)}"
            body += marker(index, px, py, hint=hint, hollow=value <= 0)
    zeros = sum(value <= 0 for value in values)
    if zeros:
        plural = "layer" if zeros == 1 else "layers"
        note += f" {zeros} {plural} without any error: hollow, on the lower edge."
    svg = figure(body, width=_WIDTH, height=302, title=f"{title}, by block and role")
    return captioned(svg, title, note=note, key=legend(list(series)))


def by_role(report: Report, key: str) -> dict[str, dict[int, float]]:
    """Return ``role -> block -> value`` in the order in which a block computes."""
    found: dict[str, dict[int, list[float]]] = {}
    for layer in report.get("layers") or []:
        value, block = number_at(layer, key), layer.get("block")
        if value is not None and isinstance(block, int):
            role = str(layer.get("role"))
            found.setdefault(role, {}).setdefault(block, []).append(value)
    order = {role: index for index, role in enumerate(ROLES)}
    roles = sorted(found, key=lambda role: order.get(role, len(order)))
    return {
        role: {block: _middle(found[role][block]) for block in sorted(found[role])}
        for role in roles
    }


def _middle(values: list[float]) -> float:
    positive = [value for value in values if value > 0]
    return statistics.geometric_mean(positive) if positive else 0.0


def ladder_plot(report: Report) -> str:
    """Return mean and percentiles of KL for each text on one log axis; or ``''``."""
    texts = branch(report, "metrics", "compressed", "texts")
    known = {
        name: {
            key: value
            for key in ("kl", *_QUANTILES)
            if (value := number_at(branch(texts, name), key)) is not None and value > 0
        }
        for name in texts
    }
    rows = {name: values for name, values in known.items() if "kl" in values}
    if not rows:
        return ""
    bottom = 34.0 + 44 * len(rows)
    everything = [v for values in rows.values() for v in values.values()]
    x = Axis.over([*everything, *GRADE_LIMITS], 8, _RIGHT, is_log=True)
    body = _limits(x, 22, bottom)
    for index, (name, values) in enumerate(rows.items()):
        body += _rung(name, values, x, 40.0 + 44 * index)
    for value, text in x.ticks():
        body += line(x.at(value), bottom, x.at(value), bottom + 4, class_="axis")
        body += label(x.at(value), bottom + 18, text, anchor="middle")
    body += line(x.start, bottom, x.end, bottom, class_="axis")
    body += label(
        240, bottom + 37, "KL per token, nats", anchor="middle", class_="name"
    )
    title = "How far the compressed model is from the base"
    svg = figure(body, width=_WIDTH, height=round(bottom + 44), title=title)
    key = mark_legend(["mean", *_QUANTILES.values()], _MARK_OF)
    note = "The dashed lines are the limits of the traffic light; they judge the mean."
    return captioned(svg, title, note=note, key=key)


def _limits(x: Axis, top: float, bottom: float) -> str:
    """Return the two limits of the traffic light as labelled lines."""
    return "".join(
        line(x.at(limit), top, x.at(limit), bottom, class_="limit")
        + label(x.at(limit), top - 6, f"{limit:g}", anchor="middle", class_="small")
        for limit in GRADE_LIMITS
    )


def _rung(name: str, values: Mapping[str, float], x: Axis, y: float) -> str:
    """Return one text: its name above, a line from least to most, a mark for each."""
    body = label(x.start, y, text_name(name), class_="name halo")
    y += 13
    body += line(
        x.at(min(values.values())), y, x.at(max(values.values())), y, class_="rung"
    )
    for index, key in enumerate(("kl", *_QUANTILES)):
        if key in values:
            said = _QUANTILES.get(key, "mean")
            hint = f"{name}, {said}: {nats(values[key])} nats"
            body += marker(_MARK_OF[index], x.at(values[key]), y, hint=hint, scale=1.5)
    return body


_MARK_OF = (3, 0, 1, 2)  # the mean as a diamond


def histogram_plots(report: Report) -> list[str]:
    """Return a histogram of KL over tokens for each text, all on the same axes."""
    texts = branch(report, "metrics", "compressed", "texts")
    shares = {name: _shares(branch(texts, name, "kl_histogram")) for name in texts}
    drawn = {name: bins for name, bins in shares.items() if bins}
    edges = [
        edge for bins in drawn.values() for low, high, _ in bins for edge in (low, high)
    ]
    top = max((share for bins in drawn.values() for *_, share in bins), default=0.0)
    plots = []
    for index, (name, bins) in enumerate(drawn.items()):
        x = Axis(min(edges), max(edges), _LEFT, _RIGHT, True)
        y = Axis.over([125 * top], 208, 26)  # a quarter more, for the labels
        body = frame(x, y, x_label="KL per token, nats", y_label="% of tokens")
        for low, high, share in bins:
            hint = f"{nats(low)} to {nats(high)} nats: {percent(share, 2)} of tokens"
            body += element(
                "rect",
                tooltip(hint),
                x=x.at(low),
                y=y.at(100 * share),
                width=max(x.at(high) - x.at(low) - 0.6, 0.4),
                height=y.start - y.at(100 * share),
                class_=f"s{index % 8} solid",
            )
        body += _quantile_lines(branch(texts, name), x, y)
        title = f"KL over the tokens of {text_name(name)}"
        svg = figure(body, width=_WIDTH, height=252, title=title)
        plots.append(captioned(svg, title))
    return plots


def _quantile_lines(metrics: Report, x: Axis, y: Axis) -> str:
    """Return mean and percentile as lines; labels on two levels, so none collide."""
    lines = labels = ""
    for index, (key, said) in enumerate({"kl": "mean", "kl_p99": "99 %"}.items()):
        value = number_at(metrics, key)
        if value is not None and value > 0:
            px = x.at(value)
            is_left = key == "kl" or px > 370  # where the right side has no room
            lines += line(px, y.end - 2, px, y.start, class_="limit")
            labels += label(
                px - 4 if is_left else px + 4,
                y.end + 10 + 16 * index,
                f"{said} {nats(value)}",
                anchor="end" if is_left else "start",
                class_="small halo",
            )
    return lines + labels


def _shares(histogram: Report) -> list[tuple[float, float, float]]:
    """Return ``(low, high, share of tokens)`` of each bin on a logarithmic axis.

    A first edge at zero and a last one at infinity (null in JSON) are drawn a bin's
    width away from their neighbour. Nothing is returned for a malformed histogram.
    """
    edges, counts = (
        list(histogram.get("edges") or []),
        list(histogram.get("counts") or []),
    )
    if len(edges) != len(counts) + 1 or len(edges) < 4:
        return []
    inner = [e for e in edges[1:-1] if isinstance(e, (int, float)) and math.isfinite(e)]
    if len(inner) != len(edges) - 2 or min(inner) <= 0 or inner != sorted(set(inner)):
        return []
    ratio = (inner[-1] / inner[0]) ** (1 / max(len(inner) - 1, 1)) or 10.0
    ratio = max(ratio, 1.01)
    first, last = number_at({"e": edges[0]}, "e"), number_at({"e": edges[-1]}, "e")
    low = first if first and 0 < first < inner[0] else inner[0] / ratio
    high = min(last, 1e12) if last and last > inner[-1] else inner[-1] * ratio
    total = sum(number_at({"c": c}, "c") or 0.0 for c in counts)
    if total <= 0:
        return []
    bounds = [low, *inner, high]
    return [
        (bounds[i], bounds[i + 1], (number_at({"c": c}, "c") or 0.0) / total)
        for i, c in enumerate(counts)
    ]
