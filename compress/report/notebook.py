"""What a notebook shows of a finished run: a short table, and the page on demand.

All of it is in the markup, so that a saved notebook shows it without the run's folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from compress.report.page import render_page
from compress.report.tables import Report
from compress.report.wording import (
    branch,
    divergence,
    fixed,
    methods_used,
    number_at,
    percent,
    plain_data,
    size,
    text_name,
    times,
    worst_text,
)


def notebook_view(report: Report, workdir: str) -> str:
    """Return HTML of the main figures, warnings, and the whole page in a frame.

    Args:
        report: Of a run.
        workdir: Where its files are, as the reader is told.
    """
    report = plain_data(report)
    label = branch(report, "model").get("label", "model")
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(what)}</th>"
        f"<td style='text-align:left'>{escape(value)}</td></tr>"
        for what, value in _rows(report)
    )
    warnings = "".join(
        f"<li>{escape(str(text))}</li>" for text in report.get("warnings") or []
    )
    count = len(report.get("warnings") or [])
    noted = f"<details><summary>{count} warnings</summary><ul>{warnings}</ul></details>"
    page = escape(render_page(report), quote=True)
    return (
        f"<div><strong>{escape(str(label))}</strong>: {escape(methods_used(report))}"
        f"<table>{rows}</table>{noted if count else ''}"
        "<details><summary>Whole report</summary>"
        f'<iframe srcdoc="{page}" sandbox="allow-scripts" loading="lazy" '
        'title="Report" style="width:100%;height:40rem;border:1px solid #888">'
        "</iframe></details>"
        f"<div>Files: <code>{escape(workdir)}</code></div></div>"
    )


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    """Yield the figures that a reader wants first."""
    sizes = branch(report, "size_bytes")
    base = number_at(sizes, "base")
    for name in sizes:
        own = number_at(sizes, name)
        if own is not None:
            share = (
                f", {percent(own / base)} of base" if base and name != "base" else ""
            )
            yield f"size, {name}", f"{size(own)}{share}"
    text = worst_text(report)
    if text is None:
        return
    before = branch(report, "metrics", "base", "texts", text)
    short = text_name(text)
    parts = {"compressed": short, "with_prompt": f"{short}, with the soft prompt"}
    for part, where in parts.items():
        figures = branch(report, "metrics", part, "texts", text)
        if not figures:
            continue
        numbers = (fixed(number_at(m, "perplexity")) for m in (before, figures))
        change = " → ".join(numbers)
        ratio = times(number_at(figures, "ppl_ratio"))
        yield f"perplexity, {where}", f"{change} ({ratio})"
        if number_at(figures, "kl") is not None:
            yield f"KL to base, {where}", f"{divergence(figures)} nats"
