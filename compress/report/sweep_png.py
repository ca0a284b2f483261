"""The figure of a sweep as PNG, for documents that show no SVG; drawn by matplotlib."""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import Any

from compress.report.front import KL, measure_of, staircase
from compress.report.sweep_plots import (
    NAMED,
    TITLE,
    Data,
    comparable,
    series_of,
)

# Okabe and Ito's colours as on the page, with the same order of shapes.
_COLOURS = ("#0072b2", "#b97a00", "#00806a", "#c24a00", "#a8508a", "#2f8cc9")
_SHAPES = ("o", "s", "^", "D", "v", "P")


def can_draw() -> bool:
    """Whether matplotlib is installed (extra ``plots``)."""
    return find_spec("matplotlib") is not None


def render_png(data: Data) -> bytes:
    """Return bytes against loss with the front, 1280 by 900 pixels on white.

    Args:
        data: What ``sweep.json`` holds.
    """
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    figure = Figure(figsize=(6.4, 4.5), dpi=200, layout="constrained")
    axes: Any = figure.add_subplot()
    key = measure_of(data["points"])
    for index, (name, points) in enumerate(series_of(data)):
        is_foreign = "model" not in points[0]
        colour = _COLOURS[index % len(_COLOURS)]
        axes.scatter(
            [point["bytes"] / 1e6 for point in points],
            [point[key] for point in points],
            label=name,
            marker=_SHAPES[index % len(_SHAPES)],
            facecolors="white" if is_foreign else colour,
            edgecolors=colour,
            zorder=2,
        )
    for group in comparable(data["points"], key):
        steps = staircase(group, key)
        axes.step(
            [point["bytes"] / 1e6 for point in steps],
            [point[key] for point in steps],
            where="post",
            color="#57606a",
            linestyle="--",
            linewidth=1,
            zorder=1,
        )
    if key == KL and all(point[key] > 0 for point in data["points"]):
        axes.set_yscale("log")
    axes.set(title=TITLE, xlabel="MB (millions of bytes)", ylabel=NAMED[key])
    axes.grid(color="#d4d8dd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
