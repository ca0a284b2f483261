"""Tables of a search under a budget: what it kept to, spent, chose and predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compress.report.tables import Report, Table
from compress.report.wording import (
    branch,
    count,
    duration,
    fixed,
    nats,
    number_at,
    percent,
    significant,
)

_LOSS_NOTE = (
    "Predicted KL is that of one unit alone, on calibration text; the whole plan's is "
    "their sum. Error is relative and in the metric of the inputs."
)


def budget_table(report: Report) -> Table:
    """Return the budget, what the file takes of it, what was measured, and time."""
    record = branch(report, "allocation")
    if not record:
        return Table("Budget", (), "", ())
    budget, file = number_at(record, "budget_bytes"), number_at(record, "file_bytes")
    share = file / budget if file is not None and budget else None
    rows = [
        ("allocator", str(record.get("method"))),
        ("budget", f"{count(budget)} bytes, {record.get('format')}"),
        ("file", f"{count(file)} bytes, {percent(share, 2)} of the budget"),
        ("outside of the choices", f"{count(number_at(record, 'fixed_bytes'))} bytes"),
        ("predicted KL", f"{nats(number_at(record, 'predicted_kl'))} nats a token"),
        ("measured KL", f"{nats(number_at(record, 'measured_kl'))} nats a token"),
        ("models measured by the search", _models(number_at(record, "evaluations"))),
    ]
    seconds = branch(record, "seconds")
    rows += [(f"time: {name}", duration(number_at(seconds, name))) for name in seconds]
    reference = "original"
    if branch(report, "pruning"):
        reference = "pruned model (what pruning took is not in it)"
    caption = (
        f"Measured is the KL to the {reference} of the model that was put together "
        "from the level database, on text that calibration has not seen but the search "
        "has."
    )
    return Table("Budget", ("quantity", "value"), "ll", tuple(rows), caption)


def _models(number: float | None) -> str:
    """Return a number of models, of which one measured on half the text is half."""
    return count(number) if number is None or number == int(number) else f"{number:.1f}"


def scheme_table(report: Report) -> Table:
    """Return how the choices are spread over schemes; most bytes first."""
    tally: dict[str, list[float]] = {}
    for unit, choice in chosen(report):
        row = tally.setdefault(str(choice.get("scheme")), [0, 0, 0, 0])
        found = len(unit.get("layers") or ()), number_at(unit, "weights")
        for i, value in enumerate((*found, *map(choice.get, ("bytes", "loss")))):
            row[i] += value or 0
    total = sum(row[1] for row in tally.values()) or 1
    rows = tuple(
        (
            scheme,
            count(layers),
            percent(weights / total),
            count(size),
            fixed(8 * size / weights if weights else None),
            nats(loss),
        )
        for scheme, (layers, weights, size, loss) in sorted(
            tally.items(), key=lambda item: -item[1][2]
        )
    )
    headers = (
        *("scheme", "layers", "of weights", "bytes"),
        *("bits per weight", "predicted KL"),
    )
    return Table("Schemes chosen", headers, "lrrrrr", rows)


def unit_table(report: Report) -> Table:
    """Return the choice of each unit."""
    rows = []
    for unit, choice in chosen(report):
        size, weights = number_at(choice, "bytes"), number_at(unit, "weights")
        bits = 8 * size / weights if size is not None and weights else None
        rows.append(
            (
                unit_name(unit.get("layers") or ()),
                str(choice.get("scheme")),
                count(size),
                fixed(bits),
                nats(number_at(choice, "loss")),
                significant(number_at(choice, "error")),
            )
        )
    headers = ("unit", "scheme", "bytes", "bits per weight", "predicted KL", "error")
    caption = _LOSS_NOTE if rows else ""
    return Table("Choice of each unit", headers, "llrrrr", tuple(rows), caption)


def unit_name(layers: Sequence[str]) -> str:
    """Return the first layer of a unit, and how many more must agree with it."""
    first, *others = layers or ("?",)
    return f"{first} +{len(others)}" if others else first


def chosen(report: Report) -> Iterator[tuple[Report, Report]]:
    """Yield each unit with the choice that it got."""
    for unit in branch(report, "allocation").get("units") or []:
        yield unit, unit["choices"][unit["chosen"]]
