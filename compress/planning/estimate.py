"""Peak memory and time of a run, predicted from shapes and one small timing.

Memory is what the interpreter and its libraries take, plus the larger of the stages'
working sets. Time counts multiplications, divided by the speed of a matrix product
timed on the spot, so that it fits the machine; both are predictions, and the report
prints them beside what was measured.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch

from compress.core.artifact import ModelDescription
from compress.core.plan import Plan

_LIBRARIES_BYTES = 750 << 20
_FLOAT = 4
# Share of a large product's speed that small products and element-wise work reach.
_EFFICIENCY = 0.55
# Candidates of a scale search, passes over the weights, their cost beside a product.
_SEARCH_OPERATIONS = 51 * 8 * 12


@dataclass(frozen=True)
class Work:
    """What a run has to do.

    Attributes:
        calibration: Windows and tokens a window; ``None`` if no method needs data.
        drift: Whether the dense model runs beside the compressed one.
        evaluation_tokens: Over all texts; each runs through both models.
        evaluation_windows: Windows that are held at once.
    """

    calibration: tuple[int, int] | None
    drift: bool
    evaluation_tokens: int
    evaluation_windows: int


@dataclass(frozen=True)
class Estimate:
    """Predicted peak memory of the process, and seconds of the run."""

    peak_memory_bytes: int
    seconds: float


def estimate(model: ModelDescription, plan: Plan, work: Work) -> Estimate:
    """Return the prediction for a run of ``plan`` on the CPU."""
    return Estimate(_memory(model, work), _operations(model, plan, work) / _speed())


def _sizes(model: ModelDescription) -> tuple[int, int, int]:
    config = model.config
    return (
        int(config["hidden_size"]),
        int(config.get("moe_intermediate_size") or config["intermediate_size"]),
        int(config["vocab_size"]),
    )


def _block_weights(model: ModelDescription) -> int:
    prefix = f"{model.family.block(0)}."
    return sum(
        info.elements for name, info in model.tensors.items() if name.startswith(prefix)
    )


def _active_weights(model: ModelDescription) -> float:
    """Return the weights that one token meets in all blocks."""
    weights = float(_block_weights(model))
    count = model.experts(0)
    if count:
        chosen = int(model.config["num_experts_per_tok"])
        experts = sum(
            model.tensors[f"{model.family.block(0)}.{linear.path}.weight"].elements
            for linear in model.block_linears(0)
            if linear.expert is not None
        )
        weights -= experts * (1 - chosen / count)
    return weights * model.block_count


def _memory(model: ModelDescription, work: Work) -> int:
    hidden, inner, vocabulary = _sizes(model)
    embedding = vocabulary * hidden * (_FLOAT + 2)
    block = _block_weights(model) * (_FLOAT + 2)
    widest = max(hidden * inner, 1) * _FLOAT
    quantize = block + 6 * widest
    if work.calibration:
        tokens = work.calibration[0] * work.calibration[1]
        streams = 2 if work.drift else 1
        states = tokens * hidden * _FLOAT * (streams + 2)
        inside = tokens * (3 * hidden + inner) * _FLOAT * (streams - 1)
        inside += tokens * 4 * inner * _FLOAT
        quantize += states + inside + 6 * inner * inner * _FLOAT
    states = work.evaluation_tokens * hidden * _FLOAT * 4
    window = work.evaluation_tokens // max(1, work.evaluation_windows)
    evaluate = states + max(2 * embedding + window * vocabulary * _FLOAT * 4, block)
    return _LIBRARIES_BYTES + max(embedding, quantize, evaluate)


def _operations(model: ModelDescription, plan: Plan, work: Work) -> float:
    hidden, inner, vocabulary = _sizes(model)
    weights = _active_weights(model)
    total = 0.0
    total += sum(
        layer.shape[0] * layer.shape[1] * _SEARCH_OPERATIONS
        for layer in plan.layers.values()
    )
    if work.calibration:
        tokens = work.calibration[0] * work.calibration[1]
        streams = 2 if work.drift else 1
        total += 2 * tokens * weights * streams
        chosen = int(model.config["num_experts_per_tok"]) if model.experts(0) else 1
        squares = ((2 + chosen) * hidden**2 + chosen * inner**2) * model.block_count
        total += 2 * tokens * squares * (0.65 + (streams - 1))
        total += sum(
            4 * layer.shape[0] * layer.shape[1] ** 2 for layer in plan.layers.values()
        )
    streams = 2
    total += 2 * work.evaluation_tokens * (weights + vocabulary * hidden) * streams
    total += work.evaluation_tokens * vocabulary * 60
    return total


@cache
def _speed() -> float:
    """Return multiply-adds times two a second that this machine reaches."""
    a, b = torch.ones(1024, 1024), torch.ones(1024, 1024)
    a @ b
    started = time.perf_counter()
    for _ in range(4):
        a @ b
    return 4 * 2 * 1024**3 / (time.perf_counter() - started) * _EFFICIENCY
