"""Passes without masks, for models in which each token sees all before it.

Windows are whole, and each is one text. transformers looks for several texts in a
window nevertheless, in each pass, and Python waits for the GPU to tell: a small model
is slower by a quarter. For an implementation that it has no masks of, it makes none.

Source: transformers, ``AttentionInterface``. Limits: models without sliding windows,
by scaled dot-product attention, which is causal where nothing else is said; passes
without a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_USUAL = "sdpa"


@contextmanager
def without_masks(model: Any) -> Iterator[None]:
    """Let a model of transformers make no masks for a while, if it needs none."""
    if model.config._attn_implementation != _USUAL or not _sees_all(model.config):
        yield
        return
    model.set_attn_implementation(_registered())
    try:
        yield
    finally:
        model.set_attn_implementation(_USUAL)


@cache
def _registered() -> str:
    """Return the name of an implementation that transformers has no masks of."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    name = "compress_causal"
    AttentionInterface.register(name, sdpa_attention_forward)
    return name


def _sees_all(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return getattr(config, "sliding_window", None) is None
    return all(kind == "full_attention" for kind in kinds)
