"""Turn ``results/*.json`` into RESULTS.md.

python benchmarks/render_results.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
INTRODUCTION = """# Results

Made by `python benchmarks/render_results.py` from `results/*.json`; do not edit. Each
section is one script of this folder; its command is what makes the figures again.
"""


def main() -> None:
    """Write RESULTS.md, sections in the order of their names."""
    paths = sorted((HERE / "results").glob("*.json"))
    sections = [section(json.loads(path.read_text())) for path in paths]
    (HERE / "RESULTS.md").write_text("\n".join([INTRODUCTION, *sections]))


def section(result: dict[str, Any]) -> str:
    """Return the Markdown of one benchmark."""
    versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
    parts = [
        f"## {result['name']}",
        result["claim"],
        *tables(result["figures"]),
        f"`{result['command']}`  \n{result['date']}; seed {result['seed']}; "
        f"{result['hardware']}; {versions}.",
    ]
    return "\n\n".join(parts) + "\n"


def tables(figures: dict[str, Any]) -> list[str]:
    """Return a table for each list of rows, after one for the single figures."""
    single = {
        key: value
        for key, value in figures.items()
        if not isinstance(value, (list, dict))
    }
    found = []
    if single:
        rows = [{"figure": key, "value": value} for key, value in single.items()]
        found.append(table(rows))
    for key, value in figures.items():
        rows = value
        if isinstance(value, dict):
            rows = [
                {"": name, **(row if isinstance(row, dict) else {"value": row})}
                for name, row in value.items()
            ]
        if isinstance(rows, list) and rows:
            found.append(f"**{key}**\n\n{table(rows)}")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table; columns in order of first appearance."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
        *(
            "| " + " | ".join(cell(row.get(column)) for column in columns) + " |"
            for row in rows
        ),
    ]
    return "\n".join(lines)


def cell(value: Any) -> str:
    """Return a value as it stands in a table: floats with four significant digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    main()
