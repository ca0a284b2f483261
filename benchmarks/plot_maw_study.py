"""Draw what ``maw_study.py`` found: each ability as a share of the dense model's.

    python benchmarks/plot_maw_study.py

Reads ``results/maw_study.json``; writes ``docs/maw_study.svg``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from results import FOLDER

from compress.report.style import STYLE
from compress.report.svg import Axis, element, figure, frame, label, marker, polyline

WIDTH, HEIGHT = 640, 400
TITLE = "Abilities by neurons removed"
TASKS = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "mmlu")
Row = Mapping[str, Any]


def series_of(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Return points ``(percent, share of the dense model's)`` by name; 1 is dense.

    Perplexity and bits per byte are shown as dense over pruned, so that down is worse.
    """
    dense = rows[0]
    known = [task for task in TASKS if dense.get(f"{task} bits/byte")]
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        percent = row["neurons removed %"]
        shares = {
            f"{task}, bits per byte": _share(dense, row, f"{task} bits/byte")
            for task in known
        }
        shares["WikiText-2, perplexity"] = _share(dense, row, "perplexity wikitext2")
        strict = "IFEval strict, instructions"
        shares["IFEval, strict"] = _share(row, dense, strict)
        for name, share in shares.items():
            if share is not None:
                found.setdefault(name, []).append((percent, share))
    return found


def _share(above: Row, below: Row, column: str) -> float | None:
    a, b = above.get(column), below.get(column)
    return None if a is None or not b else a / b


def render(rows: Sequence[Row]) -> str:
    """Return the figure as a file of its own."""
    series = series_of(rows)
    highest = max([1.0, *(y for line in series.values() for _, y in line)])
    x = Axis(0.0, 60.0, 62.0, 430.0)
    y = Axis(0.0, 1.1 * highest, 350.0, 40.0)
    body = frame(
        x, y, x_label="MLP neurons removed, %", y_label="share of the dense model's"
    )
    for index, (name, points) in enumerate(series.items()):
        places = [(x.at(percent), y.at(share)) for percent, share in points]
        body += polyline(index, places)
        body += "".join(
            marker(index, *place, hint=f"{name}, {percent} %: {share:.3g}")
            for place, (percent, share) in zip(places, points, strict=True)
        )
        body += marker(index, 446, 50 + 22 * index, scale=1.4)
        body += label(456, 54 + 22 * index, name, class_="small")
    style = element("style", STYLE + "svg { font-family: system-ui, sans-serif; }")
    ground = element("rect", width="100%", height="100%", fill="var(--ground)")
    drawn = figure(style + ground + body, width=WIDTH, height=HEIGHT, title=TITLE)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{drawn}\n'


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Write the figure, if the dense model and another are there."""
    if len(rows) > 1 and rows[0]["neurons removed %"] == 0:
        path.write_text(render(rows), "utf-8")


def main() -> None:
    """Draw the figure from the result."""
    result = json.loads((FOLDER / "maw_study.json").read_text("utf-8"))
    path = Path(__file__).parent.parent / "docs" / "maw_study.svg"
    write_plot(result["figures"]["Abilities"], path)
    print(path)


if __name__ == "__main__":
    main()
