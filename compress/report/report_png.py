"""The figures of a report as PNG, for a README; drawn by matplotlib on white.

They show what those of the page show, without its hints under the pointer.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

from compress.core.errors import MissingDependencyError
from compress.report.allocation_plots import bits_by_block
from compress.report.plots import ROLES, by_role
from compress.report.sweep_png import can_draw
from compress.report.tables import Report
from compress.report.wording import branch, number_at, text_name

# Okabe and Ito's colours as on the page, with the same order of shapes.
_COLOURS = ("#0072b2", "#b97a00", "#00806a", "#c24a00", "#a8508a", "#2f8cc9", "#4a4f55")
_SHAPES = ("o", "s", "^", "D", "v", "P", "_")
_PARTS = ("embedding", "attention", "mlp", "other")
_SERIES = {"kl": "held-out KL", "loss": "training loss"}


def report_figures(report: Report) -> dict[str, bytes]:
    """Return the PNG files of a report by name; those it has no data for are left out.

    Args:
        report: What ``report.json`` holds.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    if not can_draw():
        raise MissingDependencyError(
            "matplotlib", extra="plots", purpose="drawing figures as PNG"
        )
    figures: dict[str, Callable[[Report, Any], bool]] = {
        "size": _size,
        "kl": _divergence,
        "bits": _bits,
        "error": _error,
        "search": _search,
        "recovery": lambda r, axes: _training(branch(r, "recovery"), axes),
        "tuning": lambda r, axes: _training(branch(r, "tuning"), axes),
    }
    found = {name: _drawn(report, draw) for name, draw in figures.items()}
    return {f"{name}.png": data for name, data in found.items() if data is not None}


def _drawn(report: Report, draw: Callable[[Report, Any], bool]) -> bytes | None:
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    figure = Figure(figsize=(6.4, 4.0), dpi=200, layout="constrained")
    axes: Any = figure.add_subplot()
    if not draw(report, axes):
        return None
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _size(report: Report, axes: Any) -> bool:
    """Draw one bar a model, split by what the bytes are for."""
    tables = branch(report, "size_breakdown")
    if not tables:
        return False
    names = list(tables)
    left = [0.0] * len(names)
    for part, colour in zip(_PARTS, _COLOURS, strict=False):
        values = [(number_at(branch(tables, n), part) or 0.0) / 2**20 for n in names]
        axes.barh(names, values, left=left, label=part, color=colour)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set(title="Where the bytes are", xlabel="MiB")
    axes.legend(frameon=False)
    return True


def _divergence(report: Report, axes: Any) -> bool:
    """Draw the mean KL of each text, without and with a soft prompt."""
    metrics = branch(report, "metrics")
    texts = [
        name
        for name, figures in branch(metrics, "compressed", "texts").items()
        if number_at(figures, "kl") is not None
    ]
    if not texts:
        return False
    said = {"compressed": "compressed", "with_prompt": "with the soft prompt"}
    parts = [part for part in said if branch(metrics, part, "texts")]
    width = 0.8 / len(parts)
    for index, part in enumerate(parts):
        rows = [branch(metrics, part, "texts", name) for name in texts]
        axes.bar(
            [place + width * index for place in range(len(texts))],
            [number_at(row, "kl") or 0.0 for row in rows],
            width,
            yerr=[number_at(row, "kl_se") or 0.0 for row in rows],
            label=said[part],
            color=_COLOURS[index],
            capsize=3,
        )
    middle = width * (len(parts) - 1) / 2
    axes.set_xticks([n + middle for n in range(len(texts))], map(text_name, texts))
    axes.set(title="Distance to the base", ylabel="mean KL, nats a token")
    if len(parts) > 1:
        axes.legend(frameon=False)
    return True


def _bits(report: Report, axes: Any) -> bool:
    """Draw bits per weight over block and role, as shades with numbers."""
    cells = bits_by_block(report)
    known = {role for row in cells.values() for role in row}
    roles = [r for r in ROLES if r in known] + sorted(known - {*ROLES})
    if not roles:
        return False
    blocks = sorted(cells)
    nothing = float("nan")
    grid = [[cells[block].get(role, nothing) for role in roles] for block in blocks]
    axes.figure.set_size_inches(6.4, max(2.0, 1.0 + 0.2 * len(blocks)))
    axes.imshow(grid, aspect="auto", cmap="Blues", vmin=1, vmax=9)
    for y, row in enumerate(grid):
        for x, bits in enumerate(row):
            if bits == bits:  # a role that a block has
                ink = "white" if bits > 5.5 else "#0b1a2b"
                axes.text(
                    x, y, f"{bits:.1f}", ha="center", va="center", color=ink, size=6
                )
    axes.set_xticks(range(len(roles)), roles)
    axes.set_yticks(range(len(blocks)), blocks, fontsize=6)
    axes.set(title="Bits per weight by block and role", ylabel="block")
    return True


def _error(report: Report, axes: Any) -> bool:
    """Draw the error of each layer by block: of its output, else of its weights."""
    kinds = {"error": "output", "weight_error": "weights"}
    for key, what in kinds.items():
        series = by_role(report, key)
        if not any(v > 0 for points in series.values() for v in points.values()):
            continue
        for index, (role, points) in enumerate(series.items()):
            axes.plot(
                list(points),
                [value or float("nan") for value in points.values()],
                label=role,
                **_style(index),
            )
        axes.set_yscale("log")
        title = f"Error of each layer's {what}"
        axes.set(title=title, xlabel="block", ylabel="relative squared error")
        axes.legend(frameon=False, ncols=4, fontsize=7)
        return True
    return False


def _search(report: Report, axes: Any) -> bool:
    """Draw the best KL over models measured, where a search measured."""
    record = branch(report, "allocation")
    steps = [
        (spent, best)
        for step in record.get("history") or []
        if (spent := number_at(step, "evaluations")) is not None
        and (best := number_at(step, "best")) is not None
    ]
    if len(steps) < 2 or steps[-1][0] <= steps[0][0]:
        return False
    axes.step(*zip(*steps, strict=True), where="post", color=_COLOURS[0], marker="o")
    axes.set_yscale("log")
    title = f"Progress of {record.get('method')}"
    axes.set(title=title, xlabel="models measured", ylabel="best KL, nats a token")
    return True


def _training(record: Mapping[str, Any], axes: Any) -> bool:
    """Draw held-out KL and training loss over steps."""
    entries = record.get("evaluations") or []
    if len(entries) < 2:
        return False
    for index, (key, name) in enumerate(_SERIES.items()):
        points = [(e["step"], e[key]) for e in entries if number_at(e, key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **_style(index))
    without = number_at(record, "kl_without")
    if without is not None:
        axes.axhline(without, label="held-out KL without a prompt", **_LINE)
    method = str(record.get("method")).replace("_", " ")
    axes.set(title=f"Training: {method}", xlabel="step", ylabel="nats a token")
    axes.legend(frameon=False)
    return True


_LINE: Mapping[str, Any] = {"color": "#57606a", "linestyle": ":", "linewidth": 1.2}


def _style(index: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _SHAPES[index % len(_SHAPES)],
        "markersize": 4,
        "linewidth": 1.2,
    }
