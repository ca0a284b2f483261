"""A budget in bytes of the exported file, from however it was written."""

from __future__ import annotations

from compress.config.budget_sections import BudgetSection
from compress.core.artifact import ModelDescription
from compress.core.sizes import parse_size
from compress.planning.budget import dense_bytes, parameter_count


def budget_bytes(section: BudgetSection, base: ModelDescription) -> int:
    """Return how many bytes the file may have.

    Args:
        section: The config's ``budget``.
        base: The original model, whose weights and bytes are counted.
    """
    if section.bytes is not None:
        return parse_size(str(section.bytes))
    if section.ratio is not None:
        return int(section.ratio * sum(dense_bytes(base).values()))
    assert section.bits_per_weight is not None, "the schema wants one of three"
    return int(section.bits_per_weight * parameter_count(base) / 8)
