"""A comparison as tables: for a terminal, and in Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from compress.report.intervals import (
    accuracy,
    as_factor,
    difference_in_bits,
    in_points,
    p_value,
    points,
    ranged,
    signed_nats,
    starred,
)
from compress.report.markdown import table_sections
from compress.report.tables import Table
from compress.report.terminal import draw_table
from compress.report.wording import (
    MISSING,
    branch,
    count,
    fixed,
    nats,
    number_at,
    percent,
    size,
)

Data = Mapping[str, Any]
Row = Mapping[str, Any]

_WIDTH = 110
_RISE = "rise of it"
_WIDE = ("median", "90 %", "95 %", "99.9 %", "changed")


def comparison_text(data: Data) -> str:
    """Return the tables, and how to read them, for a terminal of about 120 columns.

    Some columns are in Markdown and JSON alone.
    """
    parts = []
    for table in comparison_tables(data):
        caption = textwrap.wrap(table.caption, _WIDTH)
        parts.append("\n".join([draw_table(_narrow(table)), *caption]))
    return "\n\n".join([*parts, *(textwrap.fill(n, _WIDTH) for n in _notes(data))])


def comparison_markdown(data: Data) -> str:
    """Return the same in Markdown, with what was run."""
    hardware, versions = branch(data, "hardware"), branch(data, "versions")
    about = (
        f"`{data['command']}`, {data['date']}, {hardware.get('cpu')}, "
        f"{hardware.get('cores')} cores, {hardware.get('device')}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    parts = ["# Comparison", *table_sections(comparison_tables(data))]
    return "\n\n".join([*parts, *_notes(data), about]) + "\n"


def comparison_tables(data: Data) -> list[Table]:
    """Return the tables that there is something to say in."""
    protocols = dict.fromkeys(str(row["protocol"]) for row in data["texts"])
    tables = [
        summary_table(data),
        *(_text_table(data, protocol) for protocol in protocols),
        _task_table(data),
        _instruction_table(data),
        _pair_table(data),
    ]
    return [table for table in tables if table.rows]


def summary_table(data: Data) -> Table:
    """Return a row for each model: size, and the first figures of each kind."""
    protocols = dict.fromkeys(str(row["protocol"]) for row in data["texts"])
    chosen = next((p for p in protocols if p.startswith("llamacpp512")), None)
    chosen = chosen or next(iter(protocols), None)
    texts = {}
    for row in reversed([r for r in data["texts"] if r["protocol"] == chosen]):
        texts[row["model"]] = row
    means = {row["model"]: row for row in data["means"]}
    base = number_at(data["models"][0], "size_bytes")
    rows = []
    for model in data["models"]:
        text, mean = texts.get(model["name"], {}), means.get(model["name"], {})
        bytes_ = number_at(model, "size_bytes")
        rows.append(
            (
                model["name"],
                size(bytes_),
                percent(bytes_ / base) if base and bytes_ is not None else MISSING,
                fixed(number_at(model, "bits_per_weight")),
                nats(number_at(text, "kl")),
                percent(number_at(text, "top1")),
                starred(text, "ppl_ratio_interval", as_factor),
                percent(number_at(mean, "accuracy")),
                starred(mean, "accuracy_difference", in_points),
                percent(number_at(mean, "flips")),
            )
        )
    columns = ("model", "size", "of base", "bits", "KL", "top-1") + (
        "perplexity",
        "accuracy",
        "difference",
        "flips",
    )
    first = next(iter(texts.values()), None)
    where = ""
    if first:
        where = f"Text: {first['text']}, {chosen}; perplexity: over the base's. "
    mean = next(iter(means.values()), None)
    if mean:
        questions = count(mean["items"])
        where += f"Accuracy: mean of {mean['tasks']} tasks, {questions} questions."
    return _table("Summary", columns, rows, left=1, caption=where)


def _text_table(data: Data, protocol: str) -> Table:
    rows = []
    for row in data["texts"]:
        if row["protocol"] != protocol:
            continue
        rows.append(
            (
                row["text"],
                row["model"],
                fixed(number_at(row, "perplexity")),
                starred(row, "ppl_ratio_interval", as_factor),
                fixed(number_at(row, "bits_per_byte"), 3),
                ranged(branch(row, "kl_interval"), nats),
                *(nats(number_at(row, f"kl_{q}")) for q in ("median", "p90", "p95")),
                *(nats(number_at(row, f"kl_{q}")) for q in ("p99", "p999", "max")),
                percent(number_at(row, "top1")),
                percent(number_at(row, "flips")),
            )
        )
    columns = (
        "text",
        "model",
        "perplexity",
        "ratio",
        "bits/byte",
        "KL",
        "median",
        "90 %",
    ) + ("95 %", "99 %", "99.9 %", "max", "top-1", "flips")
    total = sum(r["tokens"] for r in data["texts"] if r["protocol"] == protocol)
    models = len(data["models"])
    caption = f"{count(total / models)} predicted tokens a model."
    return _table(f"Texts, {protocol}", columns, rows, left=2, caption=caption)


def _task_table(data: Data) -> Table:
    rows = []
    means = [
        {"task": f"mean of {row['tasks']}", **row}
        for row in data["means"]
        if row["tasks"] > 1
    ]
    for row in [*data["tasks"], *means]:
        of = row.get("of")
        rows.append(
            (
                row["task"],
                row["model"],
                count(number_at(row, "items")) + (f" of {count(of)}" if of else ""),
                accuracy(row),
                points(row),
                percent(number_at(row, "flips")),
                percent(number_at(row, "changed")),
                p_value(row),
                fixed(number_at(row, "bits_per_byte"), 3),
                difference_in_bits(row),
            )
        )
    columns = (
        "task",
        "model",
        "questions",
        "accuracy",
        "difference",
        "flips",
        "changed",
    ) + ("p", "bits/byte", _RISE)
    caption = (
        "Questions are evenly spread over the file. Accuracy is the task's usual one; "
        "bits/byte is of the right answer; "
        "flips: right in just one of the two; changed: another choice; p: McNemar's "
        "exact test, starred if below 5 % after Holm's correction for all tasks."
    )
    return _table("Tasks", columns, rows, left=2, caption=caption)


def _instruction_table(data: Data) -> Table:
    """Return the accuracies of written answers, as IFEval has them."""
    found = [row for row in data["tasks"] if "prompt_strict" in row]
    rows = [
        (
            row["task"],
            row["model"],
            count(row["instructions"]),
            *(percent(row[f"prompt_{kind}"]) for kind in ("strict", "loose")),
            percent(row["instruction_strict"]),
            starred(row, "instruction_strict_difference", in_points),
            percent(row["instruction_loose"]),
            count(row["answer_tokens"]),
            percent(row["cut"]),
        )
        for row in found
    ]
    columns = (
        *("task", "model", "checks", "prompts strict", "loosely", "checks strict"),
        *("difference", "loose", "tokens", "cut"),
    )
    caption = ""
    if found:
        most = count(found[0]["most_tokens"])
        caption = (
            "Greedy answers, checked by rules: strict as they are, loose after removal "
            "of a first or last line and of asterisks. Accuracy above is that of whole "
            f"prompts, strict. Answers have {most} tokens at most; cut: did not end "
            "before."
        )
    for row in found[:1]:
        if row["left_out"]:
            caption += (
                f" {count(row['left_out'])} of {count(row['of'])} prompts are left "
                "out: their language counts, and langdetect is not installed."
            )
    return _table("Instructions followed", columns, rows, left=2, caption=caption)


def _pair_table(data: Data) -> Table:
    rows = []
    for row in data["pairs"]:
        name = f"{row['second']} - {row['first']}"
        tasks = branch(row, "tasks")
        accuracy = starred(tasks, "accuracy_difference", in_points)
        for index, text in enumerate(row["texts"] or [{}]):
            where = f"{text['text']}, {text['protocol']}" if text else MISSING
            kl = starred(text, "kl_difference", signed_nats)
            ends = (accuracy, p_value(tasks)) if index == 0 else (MISSING, MISSING)
            rows.append((name, where, kl, *ends))
    columns = ("candidates", "text", "KL", "accuracy, mean of tasks", "p")
    return _table("Candidates against each other", columns, rows, left=2)


def _narrow(table: Table) -> Table:
    """Return a table without :data:`_WIDE` columns, and bits without intervals."""
    kept = [i for i, header in enumerate(table.headers) if header not in _WIDE]
    rows = [
        tuple(
            re.sub(r" \[.*\]", "", row[i]) if table.headers[i] == _RISE else row[i]
            for i in kept
        )
        for row in table.rows
    ]
    headers = tuple(table.headers[i] for i in kept)
    align = "".join(table.align[i] for i in kept)
    return Table(table.title, headers, align, tuple(rows), table.caption)


def _notes(data: Data) -> list[str]:
    notes = [
        "[a, b] holds 95 % of paired bootstrap means, over windows or questions; a "
        "star marks a significant difference from the base. KL is in nats a token, "
        "differences of accuracy are in points."
    ]
    if any(model["runs_in"] == "llama.cpp" for model in data["models"]):
        notes.append(
            "GGUF files run in llama.cpp on the CPU, which rounds activations to 8 "
            "bits; that alone is a KL of a few thousandths."
        )
    return notes


def _table(
    title: str,
    columns: tuple[str, ...],
    rows: Iterable[tuple[str, ...]],
    *,
    left: int,
    caption: str = "",
) -> Table:
    """Return a table without empty columns, the first ``left`` ones left-aligned."""
    cells = list(rows)
    kept = [i for i in range(len(columns)) if any(row[i] != MISSING for row in cells)]
    return Table(
        title,
        tuple(columns[i] for i in kept),
        "".join("l" if i < left else "r" for i in kept),
        tuple(tuple(row[i] for i in kept) for row in cells),
        caption,
    )
