"""A budget in bytes of the exported file, from however it was written."""

from __future__ import annotations

from typing import Any

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


def parse_budget(text: str) -> dict[str, Any]:
    """Return the config's ``budget`` that a word of the command line stands for.

    Args:
        text: Bytes such as ``95MB``, bits such as ``4.25bpw``, or a share such as
            ``30%``.

    Raises:
        ConfigError: It is none of them.
    """
    word = text.strip().lower()
    try:
        if word.endswith("bpw"):
            return {"bits_per_weight": float(word.removesuffix("bpw"))}
        if word.endswith("%"):
            return {"ratio": float(word.removesuffix("%")) / 100}
        return {"bytes": parse_size(text)}
    except ValueError as error:
        raise ConfigError(
            f"budget {text!r} is no budget; write bytes (95MB), bits a weight of the "
            "file (4.25bpw) or a share of the original (30%)"
        ) from error
