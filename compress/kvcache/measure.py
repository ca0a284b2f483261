"""What each cache type costs on a text, and which one to take.

All types are measured against the same weights with exact inputs and an exact cache, by
one forward pass a window in which keys and values are rounded before they are attended
to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from compress.core.artifact import ModelDescription
from compress.evaluation.measure import Predictor, PreparedText, evaluate_candidates
from compress.kvcache.cache import CacheRounding, FakeQuantCache, head_count, head_size
from compress.kvcache.names import CachePair, bytes_a_token
from compress.model.streaming import StreamedModel

EXACT_PAIR = CachePair.parse("f16")
_FIGURES = ("kl", "kl_se", "kl_p99", "top1", "ppl_ratio")


def rounded_cache(
    model: ModelDescription, pair: CachePair, scales: Mapping[str, Tensor]
) -> Callable[[], FakeQuantCache]:
    """Return a maker of caches that store a pair of types.

    Raises:
        ConfigError: The types do not fit the model.
    """
    return partial(FakeQuantCache, CacheRounding(model, pair, scales))


def measure_types(
    text: PreparedText,
    build: Callable[..., StreamedModel],
    pairs: Sequence[CachePair],
    scales: Mapping[str, Tensor],
) -> list[dict[str, Any]]:
    """Return bytes and distance of each pair of cache types.

    Args:
        text: What is read.
        build: Returns the model; its keyword is ``new_cache`` of
            :class:`~compress.model.streaming.StreamedModel`.
        pairs: Types of keys and values.
        scales: Static scales by tensor name, for FP8.
    """
    exact = build()
    model = exact.description
    candidates: dict[str, Predictor] = {}
    for pair in pairs:
        cached = build(new_cache=rounded_cache(model, pair, scales))
        candidates[pair.name] = partial(cached.logits, name=f"cache {pair.name}")
    _, found = evaluate_candidates(
        [text],
        partial(exact.logits, name="exact cache"),
        candidates,
        hidden_size=int(model.config["hidden_size"]),
    )
    return [
        _entry(pair, model)
        | {key: found[pair.name][text.name][key] for key in _FIGURES}
        for pair in pairs
    ]


def _entry(pair: CachePair, model: ModelDescription) -> dict[str, Any]:
    size = partial(
        bytes_a_token,
        blocks=sum(map(model.has_attention, range(model.block_count))),
        heads=head_count(model),
        size=head_size(model),
    )
    return {
        "type": pair.name,
        "keys": pair.keys.name,
        "values": pair.values.name,
        "bits": pair.bits,
        "bytes_per_token": size(pair),
        "bytes_per_token_f16": size(EXACT_PAIR),
        "for_llamacpp": pair.is_for_llamacpp,
    }


def recommended(entries: Sequence[Mapping[str, Any]], limit: float) -> dict[str, Any]:
    """Return the smallest type for llama.cpp whose KL is within ``limit``.

    If none is, the answer is ``f16``.
    """
    fitting = [e for e in entries if e["for_llamacpp"] and e["kl"] <= limit]
    best = min(fitting, key=lambda e: (e["bits"], e["kl"]), default=None)
    keys, values = (best["keys"], best["values"]) if best else ("f16", "f16")
    flags = f"--cache-type-k {keys} --cache-type-v {values}"
    if values != "f16":
        flags += " --flash-attn on"  # without it llama.cpp refuses quantized values
    return {
        "limit": limit,
        "keys": keys,
        "values": values,
        "kl": best["kl"] if best else 0.0,
        "llamacpp_flags": flags,
    }
