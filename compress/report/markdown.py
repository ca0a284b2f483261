"""The report as Markdown: what a reviewer reads in a repository or a chat."""

from __future__ import annotations

import re
from collections.abc import Iterable

from compress.report.allocation import budget_table, scheme_table
from compress.report.pruning import block_table, pruning_table, recovery_table
from compress.report.samples import samples_table
from compress.report.serving import (
    cache_table,
    parts_table,
    prompt_table,
    upgrades_table,
)
from compress.report.tables import (
    Report,
    Table,
    distance_table,
    export_table,
    group_table,
    provenance_table,
    quality_table,
    run_table,
    size_table,
    worst_layers_table,
)
from compress.report.tasks import task_table
from compress.report.transforms import transform_table
from compress.report.tuning import tuning_table
from compress.report.wording import (
    GRADES,
    RERUN_NOTE,
    branch,
    count,
    methods_used,
    number_at,
)


def render_markdown(report: Report) -> str:
    """Return the report as GitHub-flavoured Markdown; all text of others is escaped."""
    model = branch(report, "model")
    parts = [
        f"# Compression report: {_escape(model.get('label', 'model'))}",
        _escape(
            f"{model.get('family', 'unknown')} family, "
            f"{count(number_at(model, 'parameters'))} parameters, "
            f"{count(number_at(model, 'blocks'))} blocks, {model.get('dtype')}. "
            f"Compressed: {methods_used(report)}."
        ),
        *(f"> **Warning:** {_escape(text)}" for text in report.get("warnings") or []),
    ]
    for table in (size_table(report), quality_table(report)):
        parts += _section(table)
    if branch(report, "metrics", "compressed", "texts"):
        parts.append(
            "Light: "
            + ", ".join(f"{grade.label}: {grade.meaning}" for grade in GRADES)
            + "."
        )
    parts += [*_section(distance_table(report)), *_section(task_table(report))]
    for table in (parts_table(report), upgrades_table(report), cache_table(report)):
        parts += _section(table)
    parts += _section(samples_table(report))
    parts += [*_section(export_table(report)), *_export_notes(report)]
    parts += [*_section(pruning_table(report)), *_section(block_table(report))]
    parts += table_sections((recovery_table(report), prompt_table(report)))
    parts += _section(transform_table(report))
    parts += _section(tuning_table(report))
    parts += [*_section(budget_table(report)), *_section(scheme_table(report))]
    parts += [*_section(group_table(report)), *_section(worst_layers_table(report))]
    parts += [*_section(run_table(report)), *_section(provenance_table(report))]
    parts += _rerun(report)
    return "\n\n".join(parts) + "\n"


def table_sections(tables: Iterable[Table]) -> list[str]:
    """Return heading, table and caption of each table that has rows."""
    return [part for table in tables for part in _section(table)]


def _section(table: Table) -> list[str]:
    """Return heading, table and caption, or nothing for an empty table."""
    if not table.rows:
        return []
    rule = ["---:" if side == "r" else "---" for side in table.align]
    grid = [
        [_escape(cell) for cell in table.headers],
        rule,
        *([_escape(cell) for cell in row] for row in table.rows),
    ]
    drawn = "\n".join(f"| {' | '.join(row)} |" for row in grid)
    caption = [_escape(table.caption)] if table.caption else []
    return [f"## {table.title}", drawn, *caption]


def _export_notes(report: Report) -> list[str]:
    lines = []
    for name, export in branch(report, "exports").items():
        lines += [f"- {_escape(name)}: `{_code(f)}`" for f in export.get("files") or []]
        lines += [f"- {_escape(f'{name}: {n}')}" for n in export.get("notes") or []]
    return ["\n".join(lines)] if lines else []


def _rerun(report: Report) -> list[str]:
    parts = ["## Run it again", RERUN_NOTE]
    if report.get("command"):
        parts += ["Command:", _fence(str(report["command"]), "sh")]
    if report.get("config_text"):
        parts += ["Config:", _fence(str(report["config_text"]), "yaml")]
    return parts if len(parts) > 2 else []


def _escape(text: object) -> str:
    """Return text that Markdown shows as it is, on one line, also inside a table."""
    one_line = " ".join(str(text).split())
    escaped = one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|\[\]#~])", r"\\\1", escaped)


def _code(text: object) -> str:
    """Return text for an inline code span; a backtick would end it."""
    return " ".join(str(text).replace("`", "'").split())


def _fence(text: str, language: str) -> str:
    """Return a fenced block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
