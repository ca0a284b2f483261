"""Draw size against KL of the GGUF files of ``gguf_rival.py``: ours and llama.cpp's.

    python benchmarks/plot_gguf.py

Reads ``results/gguf_rival.json``; writes ``docs/gguf_MODEL.svg``. KL is the mean of the
three texts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reference_kl import TEXTS
from results import FOLDER

from compress.report.sweep_plots import render_svg

DOCS = Path(__file__).parent.parent / "docs"


def points(rows: list[dict[str, Any]], whose: str) -> list[dict[str, Any]]:
    """Return the files of one tool as points of a sweep."""
    return [
        {
            "name": row["type"],
            "bytes": row[f"bytes {whose}"],
            "kl": sum(row[f"KL {text} {whose}"] for text in TEXTS) / len(TEXTS),
        }
        for row in rows
        if f"bytes {whose}" in row
    ]


def main() -> None:
    """Write a figure for each model."""
    result = json.loads((FOLDER / "gguf_rival.json").read_text("utf-8"))
    rows = result["figures"]["Files"]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        ours = [
            {**point, "model": model, "on_front": True}
            for point in points(mine, "ours")
        ]
        theirs = points(mine, "llama.cpp")
        path = DOCS / f"gguf_{model}.svg"
        data = {"points": ours, "foreign": theirs, "foreign_name": "llama-quantize"}
        path.write_text(render_svg(data), "utf-8")
        print(path)


if __name__ == "__main__":
    main()
