"""The table that ends a run: plain ASCII of our own, so that any terminal shows it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from compress.report.allocation import budget_table, scheme_table, unit_table
from compress.report.pruning import pruning_table, recovery_table
from compress.report.serving import (
    cache_table,
    parts_table,
    prompt_table,
    upgrades_table,
)
from compress.report.tables import (
    Report,
    Table,
    export_table,
    quality_table,
    size_table,
)
from compress.report.tasks import task_table
from compress.report.wording import branch, calibration_note, methods_used

ASCII = str.maketrans(
    {"±": "+-", "×": "x", "–": "-", "●": "*", "▲": "!", "■": "#", "Δ": "d"}
)
"""What takes the place of letters that a Windows console of page 1252 lacks."""
_FILES_SHOWN = 6
_FOLDED = ("protocol", "tokens", "limit")


def summary_table(report: Report) -> str:
    """Return the result of a run as plain text of about 100 columns.

    Says size, bits per weight, perplexity, KL and top-1 before and after for each text,
    how each export was verified, warnings, and where the files are.
    """
    tables = [
        size_table(report),
        pruning_table(report),
        recovery_table(report),
        budget_table(report),
        scheme_table(report),
    ]
    tables += [quality_table(report), prompt_table(report), task_table(report)]
    tables.append(parts_table(report))
    tables += [upgrades_table(report), cache_table(report), export_table(report)]
    parts = [_heading(report)]
    parts += [draw_table(table) for table in tables if table.rows]
    noted = pruning_table(report), task_table(report), cache_table(report)
    parts += [table.caption for table in noted if table.rows]
    warnings = report.get("warnings") or []
    if warnings:
        parts.append("\n".join(f"WARNING: {warning}" for warning in warnings))
    parts.append("Files\n" + "\n".join(f"  {path}" for path in _files(report)))
    uses = _uses(report)
    if uses:
        parts.append("To use it\n" + "\n".join(f"  {line}" for line in uses))
    return "\n\n".join(parts)


def allocation_text(label: str, record: Mapping[str, Any]) -> str:
    """Return the outcome of a search as tables for a terminal.

    Args:
        label: Of the model.
        record: ``allocation`` of ``report.json``.
    """
    report = {"allocation": record}
    tables = budget_table(report), scheme_table(report), unit_table(report)
    notes = [f"note: {note}" for note in record.get("notes") or []]
    parts = [f"Plan for {label}", *(draw_table(t) for t in tables), "\n".join(notes)]
    return "\n\n".join(part for part in parts if part)


def _heading(report: Report) -> str:
    label = branch(report, "model").get("label", "model")
    return (
        f"{label}: {methods_used(report)}\n"
        f"{calibration_note(report)} +- is one standard error."
    )


def draw_table(table: Table) -> str:
    """Return a table with two spaces between columns and a rule under the header.

    Facts that are the same in every row go below: the table has to fit a terminal.
    """
    table, shared = _fold(table)
    grid = [
        [cell.translate(ASCII).replace("\n", " ") for cell in row]
        for row in (table.headers, *table.rows)
    ]
    widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, table.align, strict=True)
        ).rstrip()
        for row in grid
    ]
    rule = "  ".join("-" * width for width in widths)
    below = [shared] if shared else []
    return "\n  ".join((table.title, lines[0], rule, *lines[1:], *below))


def _fold(table: Table) -> tuple[Table, str]:
    """Return the table without its constant columns, and what those said."""
    constant = {
        index: f"{header}: {table.rows[0][index]}"
        for index, header in enumerate(table.headers)
        if header in _FOLDED and len({row[index] for row in table.rows}) == 1
    }
    kept = [i for i in range(len(table.headers)) if i not in constant]
    smaller = Table(
        table.title,
        tuple(table.headers[i] for i in kept),
        "".join(table.align[i] for i in kept),
        tuple(tuple(row[i] for i in kept) for row in table.rows),
    )
    return smaller, "; ".join(constant.values())


def _uses(report: Report) -> list[str]:
    """Return a line for each export that has a usual consumer, to be pasted."""
    folder, lines = _folder(report), []
    for name, export in branch(report, "exports").items():
        files = [str(file) for file in export.get("files") or []]
        if name == "gguf" and files:
            lines.append(f"llama-cli -m {shlex.quote(str(folder / files[0]))}")
        elif name == "safetensors":
            where = str(folder / "export" / name)
            lines.append(f"AutoModelForCausalLM.from_pretrained({where!r})")
    prompt = branch(report, "recovery", "served").get("folder")
    if prompt:
        where = str(folder / str(prompt))
        lines.append(f"PeftModel.from_pretrained(model, {where!r})")
    return lines


def _folder(report: Report) -> PurePath:
    """Return the work directory, if it is known."""
    workdir = branch(report, "config", "run").get("workdir")
    return PurePath(str(workdir)) if workdir else PurePath()


def _files(report: Report) -> list[str]:
    """Return the paths of exports and reports, under the work directory if known."""
    folder, paths = _folder(report), list[str]()
    for export in branch(report, "exports").values():
        files = [str(folder / name) for name in export.get("files") or []]
        paths += files[:_FILES_SHOWN]
        if len(files) > _FILES_SHOWN:
            paths.append(f"... and {len(files) - _FILES_SHOWN} more beside them")
    reports = [str(folder / f"report.{kind}") for kind in ("html", "md", "json")]
    return [*paths, *reports]
