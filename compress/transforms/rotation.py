"""Rotation: spread outliers over all channels by orthogonal matrices.

* ``R1`` turns the residual stream. Gains of norms move into the linears behind them
  (RMS norms without a gain commute with ``R``); then embedding, everything that reads
  the stream ``W -> W R``, everything that writes it ``W -> R^T W``. The final norm's
  gain goes into the head, which therefore needs a weight of its own: a tied head is
  untied, and the model grows by it.
* ``R2`` turns each head's values: rows of ``v`` (and its bias), columns of ``o``.

Source: Ashkboos et al. (2024), "QuaRot", arXiv 2404.00456, stage 1; Liu et al. (2024),
"SpinQuant", arXiv 2405.16406, for the names. Differs: random Hadamard-like matrices of
any size (``orthogonal.py``), nothing learned, nothing rotated at run time (R3, R4).
Limits: with norms between a sub-layer and the stream (Gemma 2 and 3) R1 is not exact,
and is refused.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from compress.core.artifact import ModelDescription, TensorSource
from compress.core.contracts import Options
from compress.transforms.contract import Structural
from compress.transforms.operations import (
    Operation,
    RotateColumns,
    RotateRows,
    ScaleColumns,
    SetGain,
    Step,
)
from compress.transforms.orthogonal import Orthogonal, random_orthogonal
from compress.transforms.places import head_width, places_of

_WRITERS = ("o", "down")


class RotationOptions(Options):
    """Options of ``rotation``.

    Attributes:
        residual: Turn the residual stream (R1).
        heads: Turn the values of each head (R2).
        seed: Of the random signs and factors.
    """

    residual: bool = True
    heads: bool = True
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _does_something(self) -> RotationOptions:
        if not (self.residual or self.heads):
            raise ValueError("a rotation needs residual, heads or both")
        return self


class Rotation(Structural):
    """Turns the residual stream and the values of each head."""

    name = "rotation"
    summary = "orthogonal residual stream (R1) and head values (R2)"
    source = "Ashkboos et al. 2024 (arXiv 2404.00456); Liu et al. 2024 (2405.16406)"
    Options: ClassVar[type[Options]] = RotationOptions
    options: RotationOptions

    @property
    def unties(self) -> bool:  # type: ignore[override]
        """Whether the head needs a weight of its own."""
        return self.options.residual

    def problem(self, model: ModelDescription) -> str | None:
        """Return why this model cannot be treated, and what to do."""
        norms = model.family.output_norms
        if self.options.residual and norms:
            return (
                f"{model.family.name} has norms between its sub-layers and the "
                f"residual stream ({', '.join(norms)}), which do not commute with a "
                "rotation of it; set residual: false to turn the heads alone"
            )
        return None

    def step(self, model: ModelDescription, source: TensorSource) -> Step:
        """Return the operations of all tensors; reads the norms."""
        operations: dict[str, list[Operation]] = {}
        copies: dict[str, str] = {}
        if self.options.residual:
            size = int(model.config["hidden_size"])
            turn = random_orthogonal(size, self.options.seed)
            copies = _turn_stream(model, source, turn, operations)
        if self.options.heads:
            heads = random_orthogonal(head_width(model), self.options.seed + 1)
            _turn_heads(model, heads, operations)
        return Step(operations, copies)


def _turn_stream(
    model: ModelDescription,
    source: TensorSource,
    turn: Orthogonal,
    operations: dict[str, list[Operation]],
) -> dict[str, str]:
    """Add R1 to ``operations``; return the head's origin if it had no weight."""
    family, offset = model.family, model.family.norm_offset
    embedding, head = f"{family.embedding}.weight", f"{family.head}.weight"

    def add(name: str, *more: Operation) -> None:
        operations.setdefault(name, []).extend(more)

    def fold(norm: str, *readers: str) -> None:
        gain = source.read(f"{norm}.weight").float() + offset
        add(f"{norm}.weight", SetGain(offset))
        for reader in readers:
            add(f"{reader}.weight", ScaleColumns(gain), RotateColumns(turn))

    add(embedding, RotateColumns(turn))
    for index in range(model.block_count):
        block = family.block(index)
        for place in places_of(model, ("norm",), index):
            readers = [f"{block}.{path}" for path in place.readers]
            fold(f"{block}.{place.before}", *readers)
        for linear in family.linears:
            if linear.role in _WRITERS:
                for kind in ("weight", "bias"):
                    name = f"{block}.{linear.path}.{kind}"
                    if name in model.tensors:
                        add(name, RotateRows(turn))
    fold(family.final_norm, family.head)
    return {} if head in source.tensors() else {head: embedding}


def _turn_heads(
    model: ModelDescription, turn: Orthogonal, operations: dict[str, list[Operation]]
) -> None:
    """Add R2 to ``operations``."""
    for index in range(model.block_count):
        block = model.family.block(index)
        for place in places_of(model, ("value",), index):
            for kind in ("weight", "bias"):
                name = f"{block}.{place.before}.{kind}"
                if name in model.tensors:
                    rows = RotateRows(turn, place.start, place.channels)
                    operations.setdefault(name, []).append(rows)
            for reader in place.readers:
                name = f"{block}.{reader}.weight"
                operations.setdefault(name, []).append(RotateColumns(turn))
