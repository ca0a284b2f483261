"""Tiny random models of every family, and transforms applied to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from export_fixtures import StateDictSource
from gguf_fixtures import describe, tiny_config
from torch import Tensor

from compress.core.artifact import ModelDescription
from compress.core.plan import LayerPlan, Plan
from compress.core.scheme import Scheme
from compress.model.streaming import StreamedModel
from compress.transforms.catalog import TRANSFORMS
from compress.transforms.chain import Chain, Transformed
from compress.workdir import WorkDir

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8},
    "smollm3": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "phi3": {"pad_token_id": 0},
}
EVERYWHERE = ("norm", "value", "neuron")
WINDOWS = torch.randint(3, 256, (3, 24), generator=torch.Generator().manual_seed(1))


def model_of(
    kind: str, *, tied: bool = False, **changes: Any
) -> tuple[Any, ModelDescription, StateDictSource]:
    """Return a random transformers model, its description and its tensors."""
    from transformers import AutoModelForCausalLM

    values = FAMILIES[kind] | {"vocab_size": 256, "tie_word_embeddings": tied} | changes
    config = tiny_config(kind, **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # no norm is all ones, no bias zero
                parameter.add_(0.2 * torch.randn_like(parameter))
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    return model, describe(config, state, None), StateDictSource(state)


def own_logits(model: Any) -> Tensor:
    """Return what transformers computes, ``[N, T, V]``."""
    with torch.no_grad():
        return torch.stack([model(window[None]).logits[0] for window in WINDOWS])


def chain_of(*names: str, **options: Any) -> Chain:
    """Return transforms by name; options go to those that know them."""
    made = []
    for name in names:
        kind = TRANSFORMS[name]
        known = {k: v for k, v in options.items() if k in kind.Options.model_fields}
        made.append(kind(kind.Options(**known)))
    return Chain(tuple(made))


def plan_of(model: ModelDescription, scheme: str = "int3-g32") -> Plan:
    """Return a plan with every linear of the blocks."""
    grid = Scheme.parse(scheme).with_scales("float32")
    layers = {}
    for name in model.linears():
        rows, columns = model.tensors[f"{name}.weight"].shape
        layers[name] = LayerPlan(name, (rows, columns), "rtn", grid)
    return Plan("tiny", layers)


def apply(
    chain: Chain,
    model: ModelDescription,
    source: Any,
    folder: Path,
    plan: Plan | None = None,
) -> tuple[ModelDescription, Transformed]:
    """Return the transformed model."""
    seen = chain.describe(model)
    made = chain.run(
        seen,
        source,
        plan_of(model) if plan is None else plan,
        windows=WINDOWS if chain.needs_inputs else None,
        workdir=WorkDir(folder),
        device="cpu",
    )
    return seen, made


def streamed_logits(model: ModelDescription, source: Any) -> Tensor:
    """Return the logits of a source's tensors, block by block."""
    return torch.stack(list(StreamedModel(model, source).logits(WINDOWS)))
