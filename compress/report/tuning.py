"""What tuning of the codes took, and what it gave back."""

from __future__ import annotations

from compress.report.tables import Report, Table
from compress.report.wording import (
    branch,
    count,
    duration,
    nats,
    number_at,
    percent,
)

_CAPTION = (
    "Held out: windows of the calibration sources that were not trained on. Errors of "
    "single layers elsewhere in this report are those before tuning."
)


def tuning_table(report: Report) -> Table:
    """Return divergence before and after, what changed, and what it cost."""
    found = branch(report, "tuning")
    rows: list[tuple[str, ...]] = []
    title = "Tuning"
    if found:
        regime = branch(found, "options").get("regime")
        named = f" ({regime})" if regime else ""
        title = f"Tuning by {found.get('method')}{named}"
        rows = [
            ("held-out KL before, nats", nats(number_at(found, "kl_before"))),
            ("held-out KL after", nats(number_at(found, "kl_after"))),
            ("codes that changed", percent(number_at(found, "changed_codes"))),
            ("layers", count(number_at(found, "layers"))),
            ("dense weights", count(number_at(found, "dense_weights"))),
            ("steps", count(number_at(found, "steps"))),
            ("best step", count(number_at(found, "best_step"))),
            ("tokens", count(number_at(found, "tokens"))),
            ("time", duration(number_at(found, "seconds"))),
        ]
    return Table(title, ("what", "value"), "lr", tuple(rows), _CAPTION if rows else "")
