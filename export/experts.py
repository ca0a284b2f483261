"""Experts in a compressed-tensors checkpoint: what its readers ask of them.

The codes lie under the checkpoint's names, one set a matrix. transformers stacks the
experts while it loads and decodes them with *one* config group, found by a pattern that
says ``experts``; vLLM asks for the scheme of each layer's experts under the names
``experts.0.gate_proj`` and so on, whatever the family calls them, and wants one answer.
One pattern for all names below ``experts`` serves both.

Source: ``integrations/compressed_tensors.py`` of transformers 5.17 and 5.23, and
``compressed_tensors_moe.py`` of vLLM. Tried with tiny models in both releases: one
symmetric scheme loads, and is exact in the model's type; zero points, more schemes, and
coded attention beside dense experts stop with an error or, in 5.17 with Qwen 3, leave
the experts random in silence.
"""

from __future__ import annotations

import re
from itertools import islice

from compress.core import compressed_tensors as ct
from compress.core.artifact import ModelDescription
from compress.core.contracts import Problem
from compress.core.plan import Plan
from compress.core.scheme import WHOLE, Scales, Scheme, Zero

_VLLM_BITS = {4, 8}
_REMEDY = (
    "; give all experts of the model one symmetric scheme, such as int4-g128, or set "
    "dense: true to write decoded weights"
)


def expert_layers(model: ModelDescription) -> list[str]:
    """Return the names of all experts' layers, in model order."""
    return [
        f"{model.family.block(index)}.{linear.path}"
        for index in range(model.block_count)
        for linear in model.block_linears(index)
        if linear.expert is not None
    ]


def expert_problems(plan: Plan, model: ModelDescription) -> list[Problem]:
    """List why stock transformers could not load the experts of a plan."""
    layers = expert_layers(model)
    if not layers or not plan.layers:
        return []
    coded = [plan.layers[name] for name in layers if name in plan.layers]
    dense = [name for name in layers if name not in plan.layers]
    problems = []
    if dense:
        problems.append(
            Problem(
                dense[0],
                f"{len(dense)} of {len(layers)} layers of experts stay dense in a "
                "checkpoint with codes, and stock transformers (5.17, 5.23) looks for "
                f"the codes of all or of none{_REMEDY}",
            )
        )
    schemes = list(dict.fromkeys(layer.scheme for layer in coded))
    if len(schemes) > 1:
        other = next(layer for layer in coded if layer.scheme == schemes[1])
        problems.append(
            Problem(
                other.name,
                f"{other.scheme.name}, and {schemes[0].name} in {coded[0].name}: stock "
                f"transformers decodes all experts with one scheme{_REMEDY}",
            )
        )
    found = (
        (layer, message)
        for layer in coded
        if (message := _obstacle(layer.scheme)) is not None
    )
    problems += [
        Problem(layer.name, f"{layer.scheme.name}: {message}{_REMEDY}")
        for layer, message in islice(found, 1)
    ]
    return problems


def vllm_expert_problems(plan: Plan, model: ModelDescription) -> list[Problem]:
    """List why vLLM would not load the experts of a plan."""
    odd = [
        plan.layers[name]
        for name in expert_layers(model)
        if name in plan.layers and plan.layers[name].scheme.bits not in _VLLM_BITS
    ]
    return [
        Problem(
            layer.name,
            f"{layer.scheme.name}: vLLM knows experts of 4 and 8 bits only; give all "
            "experts a scheme such as int4-g128, or set runtime: transformers",
        )
        for layer in odd[:1]
    ]


def expert_notes(plan: Plan, model: ModelDescription) -> list[str]:
    """Return what a user of coded experts should know."""
    names = [name for name in expert_layers(model) if name in plan.layers]
    schemes = {plan.layers[name].scheme for name in names}
    notes = []
    bits = {scheme.bits for scheme in schemes} - _VLLM_BITS
    if bits:
        notes.append(
            f"Experts have {', '.join(map(str, sorted(bits)))} bits; transformers "
            "loads them, vLLM knows experts of 4 and 8 bits only."
        )
    if any(scheme.inputs is not None for scheme in schemes):
        notes.append(
            "transformers decodes experts while it loads them and never rounds their "
            "inputs; engines that compute with their codes do."
        )
    return notes


def _obstacle(scheme: Scheme) -> str | None:
    """Return why transformers cannot decode experts of a scheme."""
    if scheme.zero is Zero.INTEGER:
        return "stock transformers cannot decode experts with zero points"
    if ct.obstacle(scheme) is not None:
        return None  # told for every layer, experts or not
    layout = ct.layout_of(scheme).format
    # Its loader hands codes, scales and shape to the library, and nothing else.
    if scheme.scales is Scales.TWO_LEVEL:
        return (
            "stock transformers drops the outer scales of experts, and decodes other "
            "weights in silence"
        )
    if layout in ("int-quantized", "mxfp8-quantized"):
        return f"stock transformers cannot decode experts in the format {layout}"
    if layout == "float-quantized" and (
        scheme.group_size is not None or scheme.row_block not in (1, WHOLE)
    ):
        return (
            "stock transformers decodes FP8 experts with a scale for each row or "
            "matrix only"
        )
    return None


def targets(names: list[str], model: ModelDescription) -> list[str]:
    """Return the targets of a config group: names, and one pattern for all experts."""
    experts = set(expert_layers(model))
    found = [name for name in names if name not in experts]
    if len(found) < len(names):
        family = model.family
        assert family.experts is not None
        start = re.escape(f"{family.blocks}.")
        container = re.escape(f".{family.experts.container}.")
        found.append(rf"re:^{start}\d+{container}\d+\.\w+$")
    return found


def routers(model: ModelDescription) -> list[str]:
    """Return the module names of all routers, which are never coded."""
    experts = model.family.experts
    if experts is None:
        return []
    return [
        f"{model.family.block(index)}.{experts.mlp}.gate"
        for index in range(model.block_count)
        if model.experts(index)
    ]


def is_target(layer: str, entries: list[str]) -> bool:
    """Whether targets of a config group cover a layer."""
    return any(
        re.match(entry[3:], layer) is not None if entry[:3] == "re:" else entry == layer
        for entry in entries
    )
