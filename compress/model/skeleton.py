"""The module tree of a config, built by transformers without weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.core.errors import CheckpointError
from compress.core.families import family_of
from compress.core.shapes import (
    attention_flags,
    attention_of,
    has_widths,
    lacks_attention,
    mlp_widths,
)
from compress.model.experts import split_experts_


def as_transformers(config: Mapping[str, Any]) -> Any:
    """Return the config object that transformers makes of plain data.

    Raises:
        CheckpointError: transformers refuses it.
    """
    from transformers import AutoConfig

    data = dict(config)
    kind = data.pop("model_type", None)
    try:
        return AutoConfig.for_model(kind, **data)
    except Exception as error:  # each config class, and each release, has its own
        raise CheckpointError(f"transformers cannot build {kind!r}: {error}") from error


def build_skeleton(config: Mapping[str, Any]) -> Any:
    """Return the transformers model of a config, in eval mode, without weights.

    Experts are linear layers of their own, named as in the checkpoint; MLPs are as wide
    as the config says for their block, and attention is where it says.
    Buffers that the model computes (rotary frequencies, embedding scales) are real.

    Raises:
        CheckpointError: transformers cannot build the model.
    """
    from transformers import AutoModelForCausalLM

    parsed = as_transformers(config)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(
                parsed,
                attn_implementation=attention_of(config),
                dtype=torch.float32,
            )
            rebuild_blocks_(model, config)
    except Exception as error:  # each model class has checks of its own
        raise CheckpointError(
            f"transformers cannot build {parsed.model_type!r}: {error}"
        ) from error
    for module in model.modules():
        if any(
            buffer.is_meta for buffer in module._buffers.values() if buffer is not None
        ):
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")
            model._init_weights(module)
    split_experts_(model, family_of(parsed.model_type))
    return model.eval().requires_grad_(False)


def rebuild_blocks_(model: Any, config: Mapping[str, Any]) -> None:
    """Make blocks differ as a config says, if it does.

    MLPs of a width of their own are made where and in the type that torch makes modules
    by default, with the weights of a new module. Where there is no attention, neither
    it nor its norms are left.

    Args:
        model: What transformers builds of ``config``, all blocks alike.
        config: Of a family whose MLP is gated and dense, if blocks differ.

    Raises:
        CheckpointError: Lists that :func:`~compress.core.shapes.mlp_widths` or
            :func:`~compress.core.shapes.attention_flags` refuses.
    """
    family = family_of(str(config["model_type"]))
    blocks: Any = model.get_submodule(family.blocks)
    if has_widths(config):
        for block, width in zip(blocks, mlp_widths(config), strict=True):
            own = copy.copy(model.config)
            own.intermediate_size = width
            block.mlp = type(block.mlp)(own)
    if lacks_attention(config):
        for index, attends in enumerate(attention_flags(config)):
            if not attends:
                setattr(blocks[index], family.attention, NoAttention(index))
                for norm in family.attention_norms:
                    setattr(blocks[index], norm, nn.Identity())


class NoAttention(nn.Module):
    """Stands where a block has no attention, as in ``core/shapes.py``'s template."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: Tensor, past_key_values: Any = None, **_: Any
    ) -> tuple[Tensor, None]:
        """Return zeros; caches count tokens by keys that are never read."""
        if past_key_values is not None:
            keys = hidden_states[:, None, :, :1].detach()
            past_key_values.update(torch.ones_like(keys), keys, self.layer_idx)
        return torch.zeros_like(hidden_states), None
