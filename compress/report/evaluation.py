"""What ``compress eval`` prints: one row for each text and model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.report.tables import Report, Table
from compress.report.terminal import draw_table
from compress.report.wording import (
    branch,
    divergence,
    fixed,
    number_at,
    percent,
    times,
)

_KEYS = {
    "base_texts": "base",
    "texts": "model",
    "without_prompt_texts": "without the prompt",
    "weights_only_texts": "its weights alone",
}


def evaluation_text(metrics: Mapping[str, Any]) -> str:
    """Return the result of an evaluation as a table for a terminal.

    Args:
        metrics: As ``compress.evaluate`` returns them.
    """
    names = {**_KEYS, "texts": "with the prompt"} if "prompt" in metrics else _KEYS
    rows = [
        (text, who, *_figures(branch(metrics, key, text)))
        for text in branch(metrics, "texts")
        for key, who in names.items()
        if branch(metrics, key, text)
    ]
    protocols = {
        str(branch(metrics, "texts", text).get("protocol"))
        for text in branch(metrics, "texts")
    }
    title = f"{metrics.get('model')}, {' and '.join(sorted(protocols))}"
    headers = ("text", "what", "perplexity", "ratio", "bits per byte", "KL (nats)")
    table = Table(title, (*headers, "same top-1"), "llrrrrr", tuple(rows))
    hint = "+- is one standard error; --json has percentiles and flips."
    return f"{draw_table(table)}\n\n{hint}"


def _figures(found: Report) -> tuple[str, ...]:
    perplexity = fixed(number_at(found, "perplexity"))
    error = number_at(found, "perplexity_se")
    if error is not None:
        perplexity += f" ± {fixed(error)}"
    return (
        perplexity,
        times(number_at(found, "ppl_ratio")),
        fixed(number_at(found, "bits_per_byte"), 4),
        divergence(found),
        percent(number_at(found, "top1")),
    )
