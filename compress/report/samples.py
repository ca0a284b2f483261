"""What base and compressed model wrote after the same prompts, side by side."""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from html import escape
from typing import Any

from compress.report.html import paragraph
from compress.report.svg import element
from compress.report.tables import Report, Table
from compress.report.wording import branch, count, number_at

_NOTE = (
    "Greedy: each token is the most probable one, so a difference is the "
    "compression's. What differs is marked from the first other letter on; from "
    "there both go on from different words. A few texts are no measure of quality."
)


def samples_section(report: Report) -> str:
    """Return the texts as HTML, the prompt above each pair; or ``''``."""
    found = branch(report, "samples")
    pairs = [_pair(entry) for entry in found.get("prompts") or []]
    return "".join(pairs) + paragraph(_NOTE, "note") if pairs else ""


def samples_table(report: Report) -> Table:
    """Return the same as a table."""
    rows = []
    for entry in branch(report, "samples").get("prompts") or []:
        texts = branch(entry, "texts")
        rows.append(
            (
                str(entry.get("prompt")),
                str(texts.get("base", "")),
                str(texts.get("compressed", "")),
                count(number_at(branch(entry, "same_tokens"), "compressed")),
            )
        )
    headers = ("prompt", "base", "compressed", "same first tokens")
    caption = _NOTE.partition(" What differs")[0] if rows else ""
    return Table("Samples", headers, "lllr", tuple(rows), caption)


def _pair(entry: Mapping[str, Any]) -> str:
    texts = branch(entry, "texts")
    base, other = (str(texts.get(name, "")) for name in ("base", "compressed"))
    common = len(os.path.commonprefix([base, other]))
    same = number_at(branch(entry, "same_tokens"), "compressed")
    agreement = "the same text"
    if base != other:
        agreement = f"the first {count(same)} tokens are the same"
    columns = [
        element(
            "div",
            element("div", name, class_="what"),
            element("p", _marked(text, common), class_="written"),
        )
        for name, text in (("base", base), ("compressed", other))
    ]
    return element(
        "article",
        element("h3", escape(str(entry.get("prompt")).rstrip())),
        element("div", *columns, class_="pair"),
        paragraph(agreement, "note"),
        class_="sample",
    )


def _marked(text: str, common: int) -> str:
    """Return escaped text whose end, from letter ``common`` on, is marked."""
    end = text[common:]
    return escape(text[:common]) + (element("mark", escape(end)) if end else "")
