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

from compress.core.artifact import ModelDescription
from compress.core.contracts import Problem
from compress.core.plan import Plan
from compress.core.scheme import Zero

_REMEDY = (
    "; give all experts of the model one symmetric scheme, or set dense: true to write "
    "decoded weights"
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
    problems += [
        Problem(
            layer.name,
            f"{layer.scheme.name}: stock transformers cannot decode experts with zero "
            f"points{_REMEDY}",
        )
        for layer in coded[:1]
        if layer.scheme.zero is Zero.INTEGER
    ]
    return problems


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
