"""Places where channel scales can move from one layer into the next, exactly.

Three kinds, with ``s > 0`` a number for each channel:

* ``norm``: a norm's gain ``/ s``, the columns of all linears behind it ``* s``;
* ``value``: rows of ``v`` (and its bias) ``/ s``, columns of ``o`` ``* s``. Attention
  mixes tokens, never channels. Query heads that share a key-value head share its ``s``;
* ``neuron``: rows of ``up`` ``/ s``, columns of ``down`` ``* s``. The activation acts
  on ``gate`` alone, and ``up`` enters as a factor.

Norms of queries and keys come after their projections and are never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core.artifact import ModelDescription
from compress.core.shapes import mlp_widths
from compress.transforms.operations import (
    DivideGain,
    DivideRows,
    Operation,
    ScaleColumns,
)

KINDS = ("norm", "value", "neuron")


@dataclass(frozen=True)
class Place:
    """A place of one block; paths are relative to it.

    Attributes:
        kind: One of :data:`KINDS`.
        before: What gives the channels: a norm, or a linear.
        readers: The linears that read them, all of them.
        input: Name of their input in the family table.
        channels: How many numbers ``s`` has.
        start: Row of ``before`` that holds channel 0, in a fused matrix.
        width: Channels of a head, where heads share scales.
        repeats: Query heads that share a key-value head.
    """

    kind: str
    before: str
    readers: tuple[str, ...]
    input: str
    channels: int
    start: int = 0
    width: int = 1
    repeats: int = 1

    def spread(self, scale: Tensor) -> Tensor:
        """Return a number for each input column from one for each channel."""
        heads = scale.view(-1, 1, self.width).expand(-1, self.repeats, -1)
        return heads.reshape(-1)

    def gather(self, columns: Tensor, how: Callable[..., Tensor]) -> Tensor:
        """Return a number for each channel; ``how`` (mean, amax) joins its columns."""
        heads = columns.view(-1, self.repeats, self.width)
        return how(heads, dim=1).reshape(-1)


def places_of(
    model: ModelDescription, kinds: tuple[str, ...], index: int
) -> tuple[Place, ...]:
    """Return the places of a block, in order of execution.

    Args:
        model: Of a dense family.
        kinds: Which of :data:`KINDS`.
        index: Number of the block.
    """
    family, config = model.family, model.config
    inner = mlp_widths(config)[index]
    hidden = int(config["hidden_size"])
    heads = int(config["num_attention_heads"])
    shared = int(config.get("num_key_value_heads") or heads)
    width = head_width(model)
    found = []
    values, outputs = family.with_role("v", "qkv"), family.with_role("o")
    up, down = family.with_role("up", "gate_up"), family.with_role("down")
    attention, attends = family.readers("attention"), model.has_attention(index)
    if attends:
        norm = family.attention_norm
        found.append(Place("norm", norm, attention, "attention", hidden))
    if attends and values is not None and outputs is not None:
        start = (heads + shared) * width if values.role == "qkv" else 0
        found.append(
            Place(
                "value",
                values.path,
                (outputs.path,),
                outputs.input,
                shared * width,
                start,
                width,
                heads // shared,
            )
        )
    if up is not None and down is not None:
        start = inner if up.role == "gate_up" else 0
        mlp = family.readers("mlp")
        found.append(Place("norm", family.mlp_norm, mlp, "mlp", hidden))
        found.append(Place("neuron", up.path, (down.path,), down.input, inner, start))
    return tuple(place for place in found if place.kind in kinds)


def head_width(model: ModelDescription) -> int:
    """Return the width of an attention head."""
    config = model.config
    stated = config.get("head_dim")
    return int(stated or config["hidden_size"] // config["num_attention_heads"])


def storable(
    scale: Tensor, weight: Tensor, *, offset: int, dtype: torch.dtype
) -> Tensor:
    """Return scales near ``scale`` for which the norm's new weight needs no rounding.

    The weight that is stored is the rounded one, so the columns are multiplied by what
    it really divides by; without this, rounding would change the model.

    Args:
        scale: float32 ``[C]``.
        weight: The norm's weight, ``[C]``.
        offset: 1 where norms multiply by ``1 + weight``.
        dtype: Type that the weight is stored in.
    """
    gain = weight.float() + offset
    divided = (gain / scale - offset).to(dtype).float() + offset
    usable = gain * divided > 0
    ones = torch.ones_like(scale)
    return torch.where(usable, gain / torch.where(usable, divided, ones), ones)


def fold(
    place: Place, scale: Tensor, block: str, model: ModelDescription
) -> dict[str, Operation]:
    """Return the operations that move ``scale`` ``[channels]``, by tensor name.

    Args:
        place: Of ``block``.
        scale: float32, positive.
        block: Full path of the block.
        model: Its tensors say which biases there are.
    """
    columns = ScaleColumns(place.spread(scale))
    operations: dict[str, Operation] = {
        f"{block}.{path}.weight": columns for path in place.readers
    }
    before = f"{block}.{place.before}"
    if place.kind == "norm":
        offset = model.family.norm_offset
        operations[f"{before}.weight"] = DivideGain(scale, offset)
        return operations
    rows = DivideRows(scale, place.start)
    operations[f"{before}.weight"] = rows
    if f"{before}.bias" in model.tensors:
        operations[f"{before}.bias"] = rows
    return operations
