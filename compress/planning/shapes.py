"""The sizes that memory and time of a run depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.core.artifact import ModelDescription
from compress.core.plan import LayerPlan, Plan
from compress.core.scheme import Scales
from compress.parts import stacks

_WIDTH = {"float32": 4}


@dataclass(frozen=True)
class Work:
    """What a run has to do besides rounding.

    Attributes:
        calibration: Windows and tokens a window; ``None`` if no method needs data.
        drift: Whether the dense model runs beside the compressed one.
        order: Whether layers of a block are measured one after the other (``layer``) or
            at once (``block``).
        evaluation: Windows and tokens a window over all texts; each runs through both
            models.
        exports: Number of files that are written.
        written: Their bytes.
        verified: Number of them that are read back and compared.
        loads_whole: Number of those that are read back by a program that holds the
            whole model in this process.
        generated: Tokens that each model, whole in memory, writes one by one.
    """

    calibration: tuple[int, int] | None = None
    drift: bool = False
    order: str = "layer"
    evaluation: tuple[int, int] = (0, 0)
    exports: int = 0
    written: int = 0
    verified: int = 0
    loads_whole: int = 0
    generated: int = 0


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model and its plan, in elements.

    Attributes:
        hidden: Width of the states between blocks.
        inner: Width inside of the MLP.
        vocabulary: Rows of embedding and head.
        blocks: Number of decoder blocks.
        block: Weights of the largest block of those with planned layers.
        active: Weights that one token meets in a block, on average.
        parameters: Weights of the model.
        largest: Weights of the largest tensor.
        stored_bytes: Of one weight in the checkpoint.
        inside: Planned layers of that largest block, those together that are coded as
            one matrix; time counts them for each block.
        inputs: Width of each of their inputs, shared ones once, and the share of all
            tokens that passes it, which is below 1 for experts.
        outside: Planned layers that are in no block.
        planned: Every layer of the plan.
    """

    hidden: int
    inner: int
    vocabulary: int
    blocks: int
    block: int
    active: float
    parameters: int
    largest: int
    stored_bytes: int
    inside: tuple[tuple[LayerPlan, ...], ...]
    inputs: tuple[tuple[int, float], ...]
    outside: tuple[LayerPlan, ...]
    planned: tuple[LayerPlan, ...]

    @classmethod
    def of(cls, model: ModelDescription, plan: Plan) -> Shapes:
        """Read the sizes of a model and its plan."""
        config, sizes = model.config, [x.elements for x in model.tensors.values()]
        inner = config.get("moe_intermediate_size") or config["intermediate_size"]
        indices = range(model.block_count)
        planned_blocks = [i for i in indices if _inside(model, plan, i)] or [0]
        weights = _block_weights(model)
        index = max(planned_blocks, key=lambda i: weights[i])
        inside = _inside(model, plan, index)
        prefix = f"{model.family.blocks}."
        share = _share(model, index)
        experts = {x.path for x in model.block_linears(index) if x.expert is not None}
        active = [weights[i] - _idle(model, i) for i in indices]
        planned = [x for x in model.block_linears(index) if x.path in inside]
        inputs = {
            linear.input: (
                inside[linear.path].shape[1],
                share if linear.path in experts else 1.0,
            )
            for linear in planned
        }
        return cls(
            hidden=int(config["hidden_size"]),
            inner=int(inner),
            vocabulary=int(config["vocab_size"]),
            blocks=model.block_count,
            block=weights[index],
            active=sum(active) / len(active),
            parameters=sum(sizes),
            largest=max(sizes),
            stored_bytes=_WIDTH.get(model.dtype, 2),
            inside=tuple(tuple(stack) for stack in stacks(planned, inside)),
            inputs=tuple(inputs.values()),
            outside=tuple(
                x for x in plan.layers.values() if not x.name.startswith(prefix)
            ),
            planned=tuple(plan.layers.values()),
        )


def _block_weights(model: ModelDescription) -> list[int]:
    """Return the weights of each block."""
    found = [0] * model.block_count
    for name, info in model.tensors.items():
        if name.startswith(f"{model.family.blocks}."):
            number = name.removeprefix(f"{model.family.blocks}.").partition(".")[0]
            found[int(number)] += info.elements
    return found


def _share(model: ModelDescription, index: int) -> float:
    """Return the share of all tokens that an expert of a block gets."""
    count = model.experts(index)
    return int(model.config["num_experts_per_tok"]) / count if count else 1.0


def _idle(model: ModelDescription, index: int) -> float:
    """Return how many weights of a block's experts a token does not meet."""
    block = model.family.block(index)
    return (1 - _share(model, index)) * sum(
        model.tensors[f"{block}.{linear.path}.weight"].elements
        for linear in model.block_linears(index)
        if linear.expert is not None
    )


def _inside(model: ModelDescription, plan: Plan, index: int) -> dict[str, LayerPlan]:
    """Return the plan of one block by path inside the block."""
    prefix = f"{model.family.block(index)}."
    return {
        linear.path: plan.layers[prefix + linear.path]
        for linear in model.block_linears(index)
        if prefix + linear.path in plan.layers
    }


def weights_of(*layers: LayerPlan) -> int:
    """Return the number of weights of layers."""
    return sum(layer.shape[0] * layer.shape[1] for layer in layers)


def stacked_shape(layers: Sequence[LayerPlan]) -> tuple[int, int]:
    """Return rows and columns of layers that are coded as one matrix."""
    return sum(layer.shape[0] for layer in layers), layers[0].shape[1]


def searched_values(layers: Sequence[LayerPlan]) -> int:
    """Return how many more floats a weight takes while its level is looked for.

    None on plain integer grids; three where levels are not evenly spaced or scales are
    themselves coded, counted by torch's dispatcher.
    """
    scheme = layers[0].scheme
    return 0 if scheme.is_integer and scheme.scales is Scales.FREE else 3
