"""Bytes of a model and of a plan, by what they are spent on."""

from __future__ import annotations

from collections.abc import Mapping

from compress.core.artifact import ModelDescription
from compress.core.plan import Plan

_WIDTH = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
PARTS = ("embedding", "attention", "mlp", "other")


def dense_bytes(model: ModelDescription) -> dict[str, int]:
    """Return the bytes of each tensor of the uncompressed model in its own type."""
    width = _WIDTH[model.dtype]
    return {name: info.elements * width for name, info in model.tensors.items()}


def parameter_count(model: ModelDescription) -> int:
    """Return the number of stored parameters; tied ones count once."""
    return sum(info.elements for info in model.tensors.values())


def breakdown(sizes: Mapping[str, int], model: ModelDescription) -> dict[str, int]:
    """Return bytes by :data:`PARTS`, from bytes by tensor or module name."""
    totals = dict.fromkeys(PARTS, 0)
    for name, size in sizes.items():
        totals[part_of(name, model)] += size
    return totals


def part_of(name: str, model: ModelDescription) -> str:
    """Return which of :data:`PARTS` a tensor or module belongs to."""
    module = name.removesuffix(".weight").removesuffix(".bias")
    if module in (model.family.embedding, model.family.head):
        return "embedding"
    if model.family.experts and f".{model.family.experts.container}." in module:
        return "mlp"
    for linear in model.family.block_linears(0):
        if module.endswith(f".{linear.path}"):
            return "attention" if linear.path.startswith("self_attn") else "mlp"
    return "other"


def linear_bits_per_weight(plan: Plan) -> float | None:
    """Return bits of codes, scales and zeros for each weight that the plan codes."""
    weights = sum(layer.shape[0] * layer.shape[1] for layer in plan.layers.values())
    if not weights:
        return None
    bits = 0.0
    for layer in plan.layers.values():
        rows, columns = layer.shape
        bits += rows * columns * layer.scheme.bits_per_weight(columns, rows)
    return bits / weights
