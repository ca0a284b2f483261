"""Which checkpoints vLLM loads, beyond what transformers does.

Source: ``CompressedTensorsConfig._get_scheme_from_parts`` and the classes in
``compressed_tensors/schemes`` of vLLM, read in sources of 2025 and 2026, among them
``CompressedTensorsWNA8Int`` and ``CompressedTensorsW4A8Fp8``. We have not run vLLM.

Two kinds of rules. A scheme must be one that some class takes. And layers that vLLM
stacks (those that share an input: q, k, v; gate, up) must have one scheme.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from compress.core.artifact import ModelDescription
from compress.core.contracts import Problem
from compress.core.plan import LayerPlan, Plan
from compress.core.scheme import WHOLE, InputScheme, Scales, Scheme, Zero

_PER_TOKEN = InputScheme("int8")
_FP8_PER_TOKEN = InputScheme("e4m3")
_FP8_BLOCK = 128


def problems(plan: Plan, model: ModelDescription) -> list[Problem]:
    """List what vLLM would refuse or misread."""
    found = [
        Problem(name, message)
        for name, layer in plan.layers.items()
        if (message := obstacle(layer.scheme)) is not None
    ]
    for block, layers in _fused(plan, model):
        names = ", ".join(layers)
        if len({layer.scheme if layer else None for layer in layers.values()}) > 1:
            schemes = ", ".join(
                layer.scheme.name if layer else "dense" for layer in layers.values()
            )
            found.append(
                Problem(
                    f"{block}.{next(iter(layers))}",
                    f"vLLM fuses {names} of {block}, which have different schemes "
                    f"({schemes}); give them one, or set runtime: transformers",
                )
            )
            continue
        for path, layer in layers.items():
            blocked = layer is not None and layer.scheme.row_block == _FP8_BLOCK
            if layer is not None and blocked and layer.shape[0] % _FP8_BLOCK:
                found.append(
                    Problem(
                        f"{block}.{path}",
                        f"vLLM fuses {names} of {block} and wants a multiple of "
                        f"{_FP8_BLOCK} rows of each, {path} has {layer.shape[0]}; use "
                        "fp8-w8a8, or set runtime: transformers",
                    )
                )
    return found


def notes(
    plan: Plan, model: ModelDescription, layers: Iterable[LayerPlan]
) -> list[str]:
    """Return what a user of vLLM should know."""
    found = []
    reasons = {
        message: None
        for layer in layers
        if (message := obstacle(layer.scheme)) is not None
    }
    found += [f"vLLM: {reason}." for reason in reasons]
    recent = sorted({layer.scheme.name for layer in layers if _recent(layer.scheme)})
    if recent:
        found.append(f"vLLM loads {', '.join(recent)} in releases of 2026 only.")
    for block, members in _fused(plan, model):
        if len({layer.scheme if layer else None for layer in members.values()}) > 1:
            found.append(
                f"vLLM fuses {', '.join(members)} of {block}, which have different "
                "schemes here, and will not load them; transformers does."
            )
            break
    return found


def fused_layers(model: ModelDescription) -> list[tuple[str, ...]]:
    """Return the layers that vLLM fuses, as sets of module names."""
    return [
        tuple(f"{block}.{path}" for path in members)
        for block, members in _fused(Plan(model.label, {}), model)
        if len(members) > 1
    ]


def obstacle(scheme: Scheme) -> str | None:
    """Return why vLLM does not load a scheme that transformers loads."""
    if _known(scheme):
        return None
    return (
        f"no kernel takes {scheme.name}; use intB-gN, w4a8-gN, w6a8-gN, w8a8, "
        "w4afp8-g128, fp8, fp8-w8a8, fp8-block, nvfp4 or mxfp4"
    )


def _known(scheme: Scheme) -> bool:
    inputs = scheme.inputs
    if scheme.is_integer:
        if scheme.zero is Zero.INTEGER:
            return inputs is None and scheme.bits in (4, 8)
        if inputs == _FP8_PER_TOKEN:
            return (scheme.bits, scheme.group_size) == (4, 128)
        return inputs is None or inputs.grid in ("int4", "int8")
    if scheme.scales is Scales.TWO_LEVEL:
        return inputs is None or inputs.two_level
    if scheme.scales is Scales.POWER:
        return scheme.group_size == 32 and scheme.row_block == 1 and inputs is None
    if scheme.grid != "e4m3":
        return False
    if scheme.row_block == _FP8_BLOCK:
        return inputs in (None, InputScheme("e4m3", _FP8_BLOCK))
    whole_rows = scheme.group_size is None and scheme.row_block in (1, WHOLE)
    return whole_rows and inputs in (None, _FP8_PER_TOKEN)


def _recent(scheme: Scheme) -> bool:
    """Whether only releases of 2026 have a kernel."""
    if not scheme.is_integer:
        return scheme.scales is Scales.POWER and scheme.bits > 4
    if scheme.inputs is None:
        return scheme.bits not in (4, 8)
    return scheme.inputs.grid == "int4" or (
        scheme.inputs.grid == "int8"
        and not (scheme.inputs == _PER_TOKEN and scheme.bits in (4, 8))
    )


def _fused(
    plan: Plan, model: ModelDescription
) -> Iterator[tuple[str, dict[str, LayerPlan | None]]]:
    """Yield each block's name and its layers that share an input, by path."""
    for index in range(model.block_count):
        block = model.family.block(index)
        groups: dict[str, dict[str, LayerPlan | None]] = {}
        for linear in model.block_linears(index):
            layer = plan.layers.get(f"{block}.{linear.path}")
            groups.setdefault(linear.input, {})[linear.path] = layer
        yield from ((block, members) for members in groups.values())
