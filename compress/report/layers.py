"""The table of every layer on the page, sortable by each column."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from compress.report.svg import element
from compress.report.wording import (
    MISSING,
    branch,
    fixed,
    nats,
    number_at,
    significant,
    size,
)

Layer = Mapping[str, Any]


@dataclass(frozen=True)
class _Column:
    """One column: its heading, its key in a layer, and how a number is said."""

    heading: str
    key: str
    say: Callable[[float | None], str] | None = None

    @property
    def is_number(self) -> bool:
        return self.say is not None


_COLUMNS = (
    _Column("layer", "name"),
    _Column("scheme", "scheme"),
    _Column("bits per weight", "bits_per_weight", fixed),
    _Column("after", "bytes_after", size),
    _Column("error", "error", significant),
    _Column("weight error", "weight_error", significant),
    _Column("sensitivity", "sensitivity", nats),
    _Column("predicted KL", "predicted_kl", nats),
    _Column("role", "role"),
    _Column("method", "method"),
    _Column("shape", "shape"),
    _Column("before", "bytes_before", size),
    _Column("seconds", "seconds", fixed),
    _Column("notes", "notes"),
)


def layer_table(report: Mapping[str, Any]) -> str:
    """Return the table as HTML; columns that no layer fills are left out."""
    losses = _losses(report)
    layers = [
        {**layer, **losses.get(str(layer.get("name")), {})}
        for layer in report.get("layers") or []
    ]
    columns = [
        c for c in _COLUMNS if any(_shown(c, layer) != MISSING for layer in layers)
    ]
    heads = [
        element(
            "th",
            element("button", escape(column.heading), type="button"),
            scope="col",
            class_="r" if column.is_number else "",
            data_kind="number" if column.is_number else "text",
        )
        for column in columns
    ]
    rows = [
        element("tr", *(_cell(column, layer) for column in columns)) for layer in layers
    ]
    table = element(
        "table",
        element("thead", element("tr", *heads)),
        element("tbody", *rows),
        class_="sortable",
    )
    return element(
        "div",
        table,
        class_="scroll tall",
        tabindex=0,
        role="region",
        aria_label="Every layer",
    )


SENSITIVITY_NOTE = (
    "Predicted KL, in nats a token, is that of a layer's choice alone; sensitivity is "
    "what its smallest choice would have cost. Layers that must agree share both."
)


def _losses(report: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return what the search predicted for each layer, by name."""
    found: dict[str, dict[str, float | None]] = {}
    for unit in branch(report, "allocation").get("units") or []:
        choices = unit["choices"]
        smallest = min(choices, key=lambda choice: float(choice["bytes"]))
        losses = {
            "predicted_kl": number_at(choices[unit["chosen"]], "loss"),
            "sensitivity": number_at(smallest, "loss"),
        }
        found |= {str(name): losses for name in unit.get("layers") or []}
    return found


def _shown(column: _Column, layer: Layer) -> str:
    if column.say is not None:
        return column.say(number_at(layer, column.key))
    value = layer.get(column.key)
    if isinstance(value, (list, tuple)):
        separator = " × " if column.key == "shape" else "; "
        return separator.join(map(str, value)) or MISSING
    return MISSING if value is None else str(value)


def _cell(column: _Column, layer: Layer) -> str:
    """Return a cell with the raw value that the script sorts by; empty sorts last."""
    text = _shown(column, layer)
    number = number_at(layer, column.key) if column.is_number else None
    key = "" if text == MISSING else text if number is None else repr(number)
    class_ = "r" if column.is_number else "wide" if column.key == "notes" else ""
    if column.key == "name":
        opening = f'<th scope="row" data-sort="{escape(key)}">'
        return f"{opening}{escape(text)}</th>"
    return f'<td class="{class_}" data-sort="{escape(key)}">{escape(text)}</td>'
