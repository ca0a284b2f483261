"""What each cache type costs on a text, and which one to take.

All types are measured against the same weights with exact inputs and an exact cache, by
one forward pass a window in which keys and values are rounded before they are attended
to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compress.core.artifact import ModelDescription
from compress.evaluation.measure import Predictor, PreparedText, evaluate_candidates
from compress.kvcache.cache import CacheRounding, FakeQuantCache, head_count, head_size
from compress.kvcache.names import FP8, CachePair, bytes_a_token
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
    errors: dict[str, _Errors] = {}
    for pair in pairs:
        errors[pair.name] = _Errors(CacheRounding(model, pair, scales))
        cached = build(new_cache=partial(FakeQuantCache, errors[pair.name]))
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
        | {"blocks": errors[pair.name].by_block(model.block_count)}
        for pair in pairs
    ]


class _Errors:
    """Rounds as another does, and adds up the squared errors of each block."""

    def __init__(self, rounding: CacheRounding) -> None:
        self._rounding = rounding
        self._sums: dict[int, Tensor] = {}

    def __call__(
        self, keys: Tensor, values: Tensor, block: int
    ) -> tuple[Tensor, Tensor]:
        rounded = self._rounding(keys, values, block)
        pairs = zip(rounded, (keys.float(), values.float()), strict=True)
        squares = [s.square().sum() for x, y in pairs for s in (x.float() - y, y)]
        sums = torch.stack(squares).view(2, 2)
        self._sums[block] = self._sums.get(block, 0) + sums
        return rounded

    def by_block(self, count: int) -> list[dict[str, float | None]]:
        """Return root mean square errors over what is stored, by block."""
        found: list[dict[str, float | None]] = []
        for block in range(count):
            entry: dict[str, float | None] = {"keys": None, "values": None}
            if block in self._sums and self._rounding.model.has_attention(block):
                (a, b), (c, d) = self._sums[block].tolist()
                entry = {"keys": (a / b) ** 0.5 if b else None}
                entry["values"] = (c / d) ** 0.5 if d else None
            found.append(entry)
        return found


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
        "runtime": pair.runtime,
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


def recommended_for_vllm(
    entries: Sequence[Mapping[str, Any]], limit: float
) -> dict[str, Any] | None:
    """Return whether vLLM's FP8 cache is worth it; ``None`` if it was not measured."""
    for entry in entries:
        if (entry["keys"], entry["values"]) != (FP8, FP8):
            continue
        fits = entry["kl"] <= limit
        return {
            "limit": limit,
            "kl": entry["kl"],
            "vllm_flags": f"--kv-cache-dtype {FP8 if fits else 'auto'}",
            "how": "With scales in the checkpoint, as here: compress kv --store writes "
            "them, or kv_cache: {scheme: fp8} in a config; without, vLLM takes 1."
            if fits
            else "FP8 costs more than the limit; the cache stays in the model's type.",
        }
    return None
