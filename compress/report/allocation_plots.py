"""Figures of a search: the budget as a bar, bits by block and role, and progress."""

from __future__ import annotations

from collections.abc import Mapping

from compress.report.allocation import chosen
from compress.report.plots import ROLES, captioned
from compress.report.svg import (
    SERIES,
    Axis,
    element,
    figure,
    frame,
    label,
    marker,
    polyline,
    tooltip,
)
from compress.report.tables import Report
from compress.report.wording import (
    branch,
    count,
    fixed,
    nats,
    number_at,
    percent,
    size,
)

_WIDTH = 480
_LEFT, _RIGHT = 62.0, 468.0
_ROW = 18.0
_BIT_LIMITS = (3, 4, 5, 6, 8)  # between the six shades
_SHADES = ("under 3", "3 to 4", "4 to 5", "5 to 6", "6 to 8", "8 and more")


def budget_bar(report: Report) -> str:
    """Return what the file takes of its budget, scheme by scheme; or ``''``."""
    record = branch(report, "allocation")
    budget, file = number_at(record, "budget_bytes"), number_at(record, "file_bytes")
    if not budget or file is None:
        return ""
    parts: dict[str, float] = {}
    for _, choice in chosen(report):
        scheme = str(choice.get("scheme"))
        parts[scheme] = parts.get(scheme, 0.0) + (number_at(choice, "bytes") or 0.0)
    ordered = dict(sorted(parts.items(), key=lambda item: -item[1]))
    ordered["everything else"] = max(file - sum(ordered.values()), 0.0)
    scale = _WIDTH / max(budget, file)
    body = label(0, 14, f"{count(file)} bytes", class_="name")
    said = f"{percent(file / budget, 2)} of {count(budget)}"
    body += label(_WIDTH, 14, said, anchor="end")
    body += element("rect", x=0, y=21, width=_WIDTH, height=24, class_="unused")
    x = 0.0
    for index, (name, bytes_) in enumerate(ordered.items()):
        width = scale * bytes_
        hint = f"{name}: {size(bytes_)} ({percent(bytes_ / budget)} of the budget)"
        body += element(
            "rect",
            tooltip(hint),
            x=x,
            y=21,
            width=max(width - 1.0, 0.0),
            height=24,
            class_=f"s{index % SERIES} solid",
        )
        x += width
    title = "What the budget is spent on"
    items = [
        element("li", element("i", class_=f"swatch s{i % SERIES} solid"), shown)
        for i, (name, bytes_) in enumerate(ordered.items())
        if (shown := f"{name}: {size(bytes_)}")
    ]
    svg = figure(body, width=_WIDTH, height=50, title=title)
    note = "In the order of the key, from the left. Everything else: pinned and dense "
    note += "tensors, norms, tokenizer and headers."
    return captioned(svg, title, note=note, key=element("ul", *items, class_="legend"))


def bits_map(report: Report) -> str:
    """Return bits per weight by block and role, as shades with numbers; or ``''``."""
    cells = bits_by_block(report)
    roles = [role for role in ROLES if any(role in row for row in cells.values())]
    roles += sorted({role for row in cells.values() for role in row} - {*roles})
    if not roles:
        return ""
    left, top = 40.0, 22.0
    width = (_WIDTH - left) / len(roles)
    body = "".join(
        label(left + width * (i + 0.5), 14, role, anchor="middle", class_="name")
        for i, role in enumerate(roles)
    )
    for row, (block, found) in enumerate(sorted(cells.items())):
        y = top + _ROW * row
        body += label(left - 8, y + 13.5, str(block), anchor="end", class_="small")
        for i, role in enumerate(roles):
            if role in found:
                hint = f"block {block}, {role}: {fixed(found[role])} bits per weight"
                body += _cell(found[role], left + width * i, y, width, hint)
    title = "Bits per weight by block and role"
    height = round(top + _ROW * len(cells) + 2)
    items = [
        element("li", element("i", class_=f"swatch h{i}"), shade)
        for i, shade in enumerate(_SHADES)
    ]
    svg = figure(body, width=_WIDTH, height=height, title=title)
    key = element("ul", *items, class_="legend")
    return captioned(svg, title, note="Darker is more bits.", key=key)


def bits_by_block(report: Report) -> dict[int, dict[str, float]]:
    """Return ``block -> role -> bits`` a weight; experts of a role together."""
    sums: dict[int, dict[str, tuple[float, float]]] = {}
    for layer in report.get("layers") or []:
        block, bits = layer.get("block"), number_at(layer, "bits_per_weight")
        shape = list(layer.get("shape") or [])
        if isinstance(block, int) and bits is not None and len(shape) == 2:
            row, role = sums.setdefault(block, {}), str(layer.get("role"))
            total, weights = row.get(role, (0.0, 0.0))
            amount = float(shape[0] * shape[1])
            row[role] = total + bits * amount, weights + amount
    return {
        block: {role: total / weights for role, (total, weights) in row.items()}
        for block, row in sums.items()
    }


def _cell(bits: float, x: float, y: float, width: float, hint: str) -> str:
    shade = sum(bits >= limit for limit in _BIT_LIMITS)
    box = element(
        "rect",
        tooltip(hint),
        x=x,
        y=y,
        width=width - 1.5,
        height=_ROW - 1.5,
        class_=f"h{shade}",
    )
    middle = x + (width - 1.5) / 2
    text = label(
        middle, y + 13, fixed(bits, 1), anchor="middle", class_=f"small on{shade}"
    )
    return box + text


def progress_plot(report: Report) -> str:
    """Return the best KL over models measured, where a search measured; or ``''``."""
    record = branch(report, "allocation")
    steps = [
        (spent, best, str(step.get("note") or ""))
        for step in record.get("history") or []
        if (spent := number_at(step, "evaluations")) is not None
        and (best := number_at(step, "best")) is not None
    ]
    if len(steps) < 2 or steps[-1][0] <= steps[0][0]:
        return ""
    x = Axis(0.0, max(spent for spent, _, _ in steps), _LEFT, _RIGHT)
    y = Axis.over([best for _, best, _ in steps], 208, 26, is_log=True)
    body = frame(x, y, x_label="models measured", y_label="best KL, nats")
    places = [(x.at(spent), y.at(best)) for spent, best, _ in steps]
    stairs = [places[0]]
    for place in places[1:]:
        stairs += [(place[0], stairs[-1][1]), place]
    body += polyline(0, stairs)
    for (px, py), (spent, best, note) in zip(places, steps, strict=True):
        hint = f"{fixed(spent, 1)} measured: {nats(best)} nats {note}".strip()
        body += marker(0, px, py, hint=hint)
    title = f"Progress of {_method(record)}"
    svg = figure(body, width=_WIDTH, height=252, title=title)
    note = "A measurement on a share of the text counts as that share."
    return captioned(svg, title, note=note)


def _method(record: Mapping[str, object]) -> str:
    return str(record.get("method") or "the search")
