"""Questions that base and compressed model of a run answered, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.report.intervals import accuracy, difference_in_bits, p_value, points
from compress.report.tables import Report, Table
from compress.report.wording import MISSING, branch, count, fixed, number_at, percent

_CAPTION = (
    "Questions are evenly spread over each file. Accuracy is the task's usual one "
    "(IFEval: whole prompts, strict), differences are in points with 95 % of paired "
    "bootstrap means; flips: right in just one of the two; p: McNemar's exact test, "
    "starred below 5 %; bits/byte: of the right answer."
)
_WRITTEN = (
    "prompt_strict",
    "prompt_loose",
    "instruction_strict",
    "instruction_loose",
)


def task_table(report: Report) -> Table:
    """Return a row for each task that both models were given."""
    base = branch(report, "metrics", "base", "tasks")
    rows = []
    for name, own in base.items():
        other = branch(report, "metrics", "compressed", "tasks", name)
        rows.append(
            (
                name,
                f"{count(own['items'])} of {count(own['of'])}",
                accuracy(own),
                accuracy(other),
                points(other),
                percent(number_at(other, "flips")),
                p_value(other),
                fixed(number_at(own, "bits_per_byte"), 3),
                fixed(number_at(other, "bits_per_byte"), 3),
                difference_in_bits(other),
            )
        )
    headers = (
        *("task", "questions", "base", "compressed", "difference", "flips", "p"),
        *("bits/byte base", "compressed ", "rise"),
    )
    kept = [i for i in range(len(headers)) if any(r[i] != MISSING for r in rows)]
    notes = [_written(name, own) for name, own in _answered(report).items()]
    return Table(
        "Tasks",
        tuple(headers[i] for i in kept),
        "".join("llrrrrrrrr"[i] for i in kept),
        tuple(tuple(row[i] for i in kept) for row in rows),
        " ".join([_CAPTION, *notes]) if rows else "",
    )


def _answered(report: Report) -> dict[str, Mapping[str, Any]]:
    tasks = branch(report, "metrics", "compressed", "tasks")
    return {name: own for name, own in tasks.items() if "prompt_strict" in own}


def _written(name: str, own: Mapping[str, Any]) -> str:
    strict, loose, one, one_loose = (percent(number_at(own, key)) for key in _WRITTEN)
    left = ""
    if own["left_out"]:
        left = (
            f" {count(own['left_out'])} of {count(own['of'])} prompts are left out: "
            "their language counts, and langdetect is not installed."
        )
    return (
        f"{name}, compressed: prompts {strict} strict, {loose} loose; instructions "
        f"{one} strict, {one_loose} loose; {percent(own['cut'])} of the answers were "
        f"cut at {count(own['most_tokens'])} tokens.{left}"
    )
