"""Attention without masks, where each token sees all before it.

Windows are whole, and each is one text. transformers looks for several texts in a
window nevertheless, in each pass, and Python waits for the GPU to tell: a small model
is slower by a quarter. For an implementation that it has no masks of, it makes none.

Source: transformers, ``AttentionInterface``. Limits: models without sliding windows,
by scaled dot-product attention, which is causal where nothing else is said.
"""

from __future__ import annotations

from typing import Any

_NAME = "compress_causal"


def attend_without_masks_(model: Any) -> None:
    """Let a model of transformers attend without masks, if it is of that kind."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    config = model.config
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        full = getattr(config, "sliding_window", None) is None
    else:
        full = all(kind == "full_attention" for kind in kinds)
    if full and config._attn_implementation == "sdpa":
        AttentionInterface.register(_NAME, sdpa_attention_forward)
        model.set_attn_implementation(_NAME)
