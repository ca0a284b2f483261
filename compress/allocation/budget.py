"""A budget in bytes of the exported file, from however it was written."""

from __future__ import annotations

from collections.abc import Sequence

from compress.config.budget_sections import BudgetSection
from compress.core.artifact import ModelDescription
from compress.core.errors import ConfigError
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


def format_of_budget(section: BudgetSection, formats: Sequence[str]) -> str:
    """Return which of the exported formats has the file that the budget is of.

    Raises:
        ConfigError: Nothing is exported, or not the format that the budget names.
    """
    if not formats:
        raise ConfigError(
            "budget: the size of which file? add an export, such as export: [{format: "
            "gguf}]"
        )
    if section.format is not None and section.format not in formats:
        raise ConfigError(
            f"budget.format: {section.format} is not exported; exports are "
            f"{', '.join(formats)}"
        )
    return section.format or formats[0]
