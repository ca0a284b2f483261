"""What pruning removed: the table of the whole model, and that of its blocks."""

from __future__ import annotations

from compress.report.tables import Report, Table
from compress.report.wording import (
    MISSING,
    branch,
    count,
    duration,
    nats,
    number_at,
    percent,
    significant,
)

_HEADERS = ("what", "before", "after", "kept")
_BLOCK_HEADERS = (
    "block",
    "neurons before",
    "after",
    "kept",
    "error of MLP output",
    "of attention output",
)
_HELD_OUT = (
    "Held out: windows of the calibration sources that were not trained on. What is "
    "kept is that of the best step."
)
_ERRORS = (
    "Error: mean square of the output's error over that of the output, on "
    "calibration text, after the repair."
)


def pruning_table(report: Report) -> Table:
    """Return neurons, heads, blocks and weights before and after."""
    found = branch(report, "pruning")
    rows: list[tuple[str, ...]] = []
    if found:
        blocks = found.get("blocks") or []
        dropped = found.get("dropped") or []
        heads = branch(found, "kv_groups")
        cut = heads.get("before") != heads.get("after")
        pairs = {
            "MLP neurons": branch(found, "neurons"),
            **({"key-value groups in a block": heads} if cut else {}),
            "blocks": {"before": len(blocks) + len(dropped), "after": len(blocks)},
            "weights": branch(found, "parameters"),
        }
        for what, pair in pairs.items():
            before, after = number_at(pair, "before"), number_at(pair, "after")
            kept = after / before if before and after is not None else None
            rows.append((what, count(before), count(after), percent(kept)))
    return Table("Pruning", _HEADERS, "lrrr", tuple(rows), pruning_note(report))


def pruning_note(report: Report) -> str:
    """Return how it was pruned, in one sentence; empty without pruning."""
    found = branch(report, "pruning")
    if not found:
        return ""
    dropped = found.get("dropped") or []
    parts = [
        f"Method {found.get('method')}, budgets {found.get('budgets')}, shape "
        f"{found.get('shape')} in multiples of {found.get('round_to')}, repair "
        f"{found.get('repair')}."
    ]
    if dropped:
        parts.append(f"Dropped blocks: {', '.join(map(str, dropped))}.")
    silent = found.get("attention_removed") or []
    if silent:
        parts.append(f"Blocks without attention: {', '.join(map(str, silent))}.")
    return " ".join(parts)


def block_table(report: Report) -> Table:
    """Return the width of each block before and after."""
    rows = []
    for block in branch(report, "pruning").get("blocks") or []:
        before, after = number_at(block, "before"), number_at(block, "after")
        kept = after / before if before and after is not None else None
        errors = [number_at(block, key) for key in ("error", "attention_error")]
        rows.append(
            (
                str(block.get("block")),
                count(before),
                count(after),
                percent(kept),
                *(MISSING if e is None else significant(e) for e in errors),
            )
        )
    measured = [any(row[n] != MISSING for row in rows) for n in (4, 5)]
    width = 6 if measured[1] else 5  # most runs leave attention alone
    return Table(
        "Blocks after pruning",
        _BLOCK_HEADERS[:width],
        "r" * width,
        tuple(row[:width] for row in rows),
        _ERRORS if any(measured) else "",
    )


def recovery_table(report: Report) -> Table:
    """Return what training took and gave back, and what a soft prompt costs."""
    found = branch(report, "recovery")
    rows: list[tuple[str, ...]] = []
    if found:
        bare = number_at(found, "kl_without")
        if bare is not None:
            rows.append(("held-out KL without a prompt, nats", nats(bare)))
        before = "held-out KL before training, nats"
        if bare is not None:
            before = "with the prompt, before training"
        rows += [
            (before, nats(number_at(found, "kl_before"))),
            ("held-out KL after training", nats(number_at(found, "kl_after"))),
            ("steps", count(number_at(found, "steps"))),
            ("best step", count(number_at(found, "best_step"))),
            ("tokens", count(number_at(found, "tokens"))),
            ("time", duration(number_at(found, "seconds"))),
            *_served(branch(found, "served")),
        ]
    caption = _HELD_OUT if rows else ""
    method = str(found.get("method")).replace("_", " ")
    title = f"Recovery by {method}" if rows else "Recovery"
    return Table(title, ("what", "value"), "lr", tuple(rows), caption)


def _served(found: Report) -> list[tuple[str, str]]:
    """Return what whoever serves a soft prompt pays for it; nothing without one."""
    if not found:
        return []
    tokens, room = number_at(found, "tokens"), number_at(found, "context_tokens")
    lost = f"{count(tokens)} of {count(room)} tokens"
    rows = [
        ("virtual tokens before every text", count(tokens)),
        ("context they take", lost),
        ("file of the prompt", f"{count(number_at(found, 'bytes'))} bytes"),
        ("served by", "transformers with peft"),
    ]
    lacking = found.get("cannot_carry") or []
    if lacking:
        rows.append(("exports that cannot carry it", ", ".join(map(str, lacking))))
    return rows
