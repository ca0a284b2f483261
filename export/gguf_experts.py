"""Experts in GGUF: one tensor ``[E, R, C]`` for a projection of all experts of a block.

llama.cpp calls them ``ffn_gate_exps``, ``ffn_up_exps`` and ``ffn_down_exps``. The rows
of the experts follow one another, so a stack is the concatenation of what each expert's
matrix would be alone, and the codes go in unchanged. A tensor has one type: all experts
of a block must agree on it for each projection, while blocks and projections may
differ.

Source: llama.cpp ``convert_hf_to_gguf.py``; the graphs ``llama`` (Mixtral) and
``qwen3moe``, which always normalise the weights of the chosen experts, and of which the
second has no ordinary MLP between mixtures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compress.core.artifact import ModelDescription
from compress.core.contracts import Problem
from compress.core.families import Linear, expert_count
from compress.core.plan import LayerPlan, Plan
from compress.export.gguf_reader import MetadataValue
from compress.export.gguf_writer import whole


@dataclass(frozen=True)
class Stack:
    """One projection of all experts of a block.

    Attributes:
        target: GGUF name.
        members: Module names in the order of the experts.
        shape: ``[E, R, C]``.
    """

    target: str
    members: tuple[str, ...]
    shape: tuple[int, int, int]


def expert_stacks(
    model: ModelDescription, find: Callable[[str], str | None]
) -> list[Stack]:
    """Return the stacked tensors of a model, block after block.

    Args:
        model: Any; without experts the list is empty.
        find: From transformers' tensor name to GGUF's.
    """
    experts = model.family.experts
    if experts is None:
        return []
    stacks = []
    for index in range(model.block_count):
        block = model.family.block(index)
        groups: dict[str, list[Linear]] = {}
        for linear in model.block_linears(index):
            if linear.expert is not None:
                groups.setdefault(linear.role, []).append(linear)
        for group in groups.values():
            members = tuple(f"{block}.{linear.path}" for linear in group)
            leaf = group[0].path.rpartition(".")[2]
            target = find(f"{block}.{experts.container}.{leaf}.weight")
            assert target is not None, f"gguf has no name for the experts' {leaf}"
            rows, columns = model.tensors[f"{members[0]}.weight"].shape
            stacks.append(Stack(target, members, (len(members), rows, columns)))
    return stacks


def members_of(stack: Stack, plan: Plan) -> list[LayerPlan] | Problem:
    """Return the plan of a stack's experts; empty if all stay dense.

    A problem if only some have codes.
    """
    coded = [plan.layers[name] for name in stack.members if name in plan.layers]
    if len(coded) not in (0, len(stack.members)):
        dense = next(name for name in stack.members if name not in plan.layers)
        return Problem(
            dense,
            f"stays dense, and {coded[0].name} is {coded[0].scheme.name}: GGUF stores "
            f"{stack.target} in one type; give the experts of a block one scheme",
        )
    return coded


def expert_metadata(model: ModelDescription) -> dict[str, MetadataValue]:
    """Return the metadata of a mixture, without the architecture before each key."""
    if model.family.experts is None:
        return {}
    config = model.config
    values = {
        "expert_count": whole(expert_count(config)),
        "expert_used_count": whole(config["num_experts_per_tok"]),
    }
    width = config.get("moe_intermediate_size")
    return values | ({"expert_feed_forward_length": whole(width)} if width else {})


def mixture_problems(model: ModelDescription) -> list[Problem]:
    """List what llama.cpp's graph of a mixture cannot express."""
    if model.family.experts is None:
        return []
    problems = []
    if not model.config.get("norm_topk_prob", True):
        problems.append(
            Problem(
                "norm_topk_prob",
                "is false, and llama.cpp always normalises the weights of the chosen "
                "experts; export to safetensors",
            )
        )
    dense = [index for index in range(model.block_count) if not model.experts(index)]
    if dense:
        problems.append(
            Problem(
                model.family.block(dense[0]),
                "has an ordinary MLP, and llama.cpp expects experts in every block; "
                "export to safetensors",
            )
        )
    return problems
