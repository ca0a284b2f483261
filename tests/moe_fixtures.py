"""Tiny random mixtures of experts: four experts, two for each token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pipeline_fixtures import save_checkpoint
from torch import Tensor, nn

from compress.core.plan import LayerPlan, Plan
from compress.core.scheme import Scheme
from compress.model.experts import weight_of
from compress.model.loading import ModelHandle, open_model

KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
    },
}
EXPERTS = {"mixtral": "block_sparse_moe.experts", "qwen3_moe": "mlp.experts"}


def save_mixture(folder: Path, kind: str, **changes: Any) -> Any:
    """Save a checkpoint with tokenizer; returns the transformers model in float32."""
    return save_checkpoint(folder, kind, **(KINDS[kind] | changes))


def opened(folder: Path) -> ModelHandle:
    return open_model(str(folder), cache=folder / "cache")


def plan_of(handle: ModelHandle, method: str, scheme: str = "int4-g32") -> Plan:
    """Return a plan that codes every layer."""
    description = handle.description
    grid = Scheme.parse(scheme).with_scales(description.dtype)
    layers = {}
    for name in description.linears():
        rows, columns = description.tensors[f"{name}.weight"].shape
        layers[name] = LayerPlan(name, (rows, columns), method, grid)
    return Plan(description.label, layers)


def expert_layer(kind: str, block: int, expert: int, role: str) -> str:
    """Return the checkpoint's name of one expert's ``gate``, ``up`` or ``down``."""
    mixtral = {"gate": "w1", "up": "w3", "down": "w2"}
    leaf = mixtral[role] if kind == "mixtral" else f"{role}_proj"
    return f"model.layers.{block}.{EXPERTS[kind]}.{expert}.{leaf}"


def routed(model: Any, block: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return what transformers hands to the experts of a block, and whom it chooses.

    Returns:
        States ``[T, H]``, and experts int64 ``[T, K]``.
    """
    states: list[Tensor] = []
    chosen: list[Tensor] = []

    def watch(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        states.append(arguments[0].detach())
        chosen.append(arguments[1])

    hook = model.model.layers[block].mlp.experts.register_forward_pre_hook(watch)
    with torch.no_grad():
        for window in tokens:
            model(window[None])
    hook.remove()
    return torch.cat(states), torch.cat(chosen)


def inner(model: Any, family: Any, kind: str, place: tuple[int, int]) -> Any:
    """Return a function from an expert's input to the input of its down matrix."""
    gate, up = (
        weight_of(model, family, expert_layer(kind, *place, role)).detach().clone()
        for role in ("gate", "up")
    )
    return lambda x: nn.functional.silu(x @ gate.T) * (x @ up.T)
