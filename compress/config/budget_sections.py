"""The sections ``budget`` and ``allocate``: mixed precision under a size."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from compress.config.fields import Section, Text, check_scheme
from compress.core.errors import ConfigError
from compress.core.sizes import parse_size

_SUFFIXES = {"bpw": "bits_per_weight", "x": "ratio"}


def check_size(size: int | str) -> int | str:
    """Return a size in bytes or words if it is one; a ``ValueError`` otherwise."""
    parse_size(str(size))
    return size


def budget_assignments(text: str) -> list[str]:
    """Return what sets a config's budget, as ``--set`` would.

    ``quantize.scheme`` is taken away, since the schemes are chosen then.

    Args:
        text: A size (``95MB``), bits per weight (``4.25bpw``), or a share of the
            original's bytes (``0.3x``).

    Raises:
        ConfigError: It is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(bpw|x)\s*", text, re.IGNORECASE)
    if match:
        key, value = _SUFFIXES[match[2].lower()], match[1]
    else:
        try:
            key, value = "bytes", str(parse_size(text))
        except ValueError:
            raise ConfigError(
                f"budget {text!r}: expected a size such as 95MB, bits per weight such "
                "as 4.25bpw, or a share of the original such as 0.3x"
            ) from None
    kept = {"bytes": "null", "bits_per_weight": "null", "ratio": "null", key: value}
    found = [f"budget.{name}={given}" for name, given in kept.items()]
    return [*found, "quantize.scheme=null"]


class BudgetSection(Section):
    """How large the exported file may be, everything in it counted; one of three."""

    bits_per_weight: float | None = Field(
        default=None, gt=0, description="Bits of the file for each weight of the model."
    )
    bytes: Annotated[int | str, AfterValidator(check_size)] | None = Field(
        default=None, description="Size of the file, such as 90MB or 4GiB."
    )
    ratio: float | None = Field(
        default=None, gt=0, lt=1, description="Share of the original's bytes."
    )
    format: Text | None = Field(
        default=None, description="Which export is meant; the first one if null."
    )

    @model_validator(mode="after")
    def _says_one_thing(self) -> BudgetSection:
        given = (self.bits_per_weight, self.bytes, self.ratio)
        if sum(value is not None for value in given) != 1:
            raise ValueError("give one of bits_per_weight, bytes and ratio")
        return self


class AllocateSection(Section):
    """How a scheme is chosen for each layer, under the budget.

    Every layer is quantized once to every scheme, by `quantize.method`, and kept in the
    cache; layers whose scheme an override sets are not searched.
    """

    method: Text = Field(default="ilp", description="Name of an allocator.")
    schemes: (
        Annotated[
            tuple[Annotated[Text, AfterValidator(check_scheme)], ...],
            Field(strict=False, min_length=1),
        ]
        | None
    ) = Field(
        default=None,
        description="What a layer may become; null takes the usual ones of the format.",
    )
    options: dict[str, Any] = Field(default={}, description="Options of the allocator.")
    sensitivity: Literal["fisher", "measured"] = Field(
        default="fisher",
        description="How the loss of a choice is predicted: from gradients of all "
        "layers at once, or by measuring the KL of one layer after another.",
    )
    samples: int = Field(
        default=64, ge=1, description="Calibration sequences for sensitivities."
    )
    windows: int = Field(
        default=8, ge=1, description="Sequences of other text that KL is measured on."
    )
    sequence_length: int = Field(
        default=256, ge=2, description="Tokens in one of them."
    )
