"""Tiny random transformers models, with what the library knows of them."""

from __future__ import annotations

from typing import Any

import torch
from export_fixtures import StateDictSource
from gguf_fixtures import describe, tiny_config

from compress.core.artifact import ModelDescription


def attention(kind: str) -> str | None:
    """Return the attention that computes what a family is meant to.

    transformers before 5.21 leaves soft caps out of its default.
    """
    return "eager" if kind == "gemma2" else None


def random_model(
    kind: str = "llama", **changes: Any
) -> tuple[Any, ModelDescription, StateDictSource]:
    """Return a model in eval mode, its description and its tensors.

    Args:
        kind: ``model_type``.
        changes: To the config of :func:`tiny_config`.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind, **changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention(kind)
    ).eval()
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    return model, describe(config, state, None), StateDictSource(state)
