"""A cache in few bits: streamed, in generation and in stock transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming_fixtures import WINDOWS, model_of
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from compress.calibration.observe import observe
from compress.core.errors import ConfigError
from compress.core.families import interleaves_rotary
from compress.kvcache.cache import CacheRounding, FakeQuantCache, ObservingCache
from compress.kvcache.measure import rounded_cache
from compress.kvcache.names import CachePair
from compress.kvcache.scales import ScaleRule
from compress.model.streaming import StreamedModel

HEADS_OF_32 = {"head_dim": 32}


def logits(streamed: StreamedModel) -> Tensor:
    return torch.stack(list(streamed.logits(WINDOWS)))


def scales_of(streamed: StreamedModel, rule: ScaleRule) -> dict[str, Tensor]:
    return observe(
        lambda **options: streamed.with_source(streamed.source, **options),
        WINDOWS,
        rule=rule,
    ).kv_scales


def dense_cache(model: Any) -> DynamicCache:
    """Return the exact cache after a forward pass of all windows."""
    cache = DynamicCache()
    with torch.no_grad():
        model(WINDOWS, past_key_values=cache)
    return cache


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "phi3"])
def test_an_exact_cache_changes_nothing(kind: str) -> None:
    _, description, source = model_of(kind)
    plain = StreamedModel(description, source)
    cached = plain.with_source(
        source, new_cache=rounded_cache(description, CachePair.parse("f16"), {})
    )
    torch.testing.assert_close(logits(cached), logits(plain), rtol=0, atol=1e-5)


def test_scales_are_those_of_keys_after_the_rotary_embedding() -> None:
    model, description, source = model_of("llama")
    cache = dense_cache(model)
    found = scales_of(StreamedModel(description, source), ScaleRule("attn_head"))
    for block, layer in enumerate(cache.layers):
        for name, states in (("k_scale", layer.keys), ("v_scale", layer.values)):
            scale = found[f"model.layers.{block}.self_attn.{name}"]
            expected = states.abs().amax((0, 2, 3)) / 448
            torch.testing.assert_close(scale.flatten(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_logits_are_those_of_transformers_with_the_scales_in_its_checkpoint(
    strategy: str, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    model, description, source = model_of("llama")
    streamed = StreamedModel(description, source)
    # Half of the range, so that values are clipped too.
    scales = {
        name: scale / 2
        for name, scale in scales_of(streamed, ScaleRule(strategy)).items()
    }
    save_with_scales(model, scales, strategy, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.stack([loaded(w[None]).logits[0] for w in WINDOWS])
    pair = CachePair.parse("fp8")
    ours = logits(
        streamed.with_source(source, new_cache=rounded_cache(description, pair, scales))
    )
    plain = logits(streamed)
    loss = (expected - plain).abs().max()
    assert loss > 0.01  # the library rounds at all
    # Both compute in float32 in another order; a key on a tie may fall to either side.
    assert (ours - expected).abs().max() < 0.02 * loss


def save_with_scales(
    model: Any, scales: dict[str, Tensor], strategy: str, folder: Path
) -> None:
    """Save a dense checkpoint whose config asks for an FP8 cache."""
    model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file(load_file(weights) | scales, weights, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "compressed",
        "config_groups": {},
        "ignore": ["lm_head"],
        "kv_cache_scheme": {
            "num_bits": 8,
            "type": "float",
            "strategy": strategy,
            "symmetric": True,
            "dynamic": False,
        },
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


def test_a_prefill_loses_what_steps_of_one_token_lose() -> None:
    model, description, _ = model_of("llama", **HEADS_OF_32)
    new_cache = rounded_cache(description, CachePair.parse("q4_0"), {})
    with torch.no_grad():
        whole = model(WINDOWS[:1], past_key_values=new_cache()).logits
        cache = new_cache()
        steps = [
            model(token[None, None], past_key_values=cache).logits
            for token in WINDOWS[0]
        ]
        exact = model(WINDOWS[:1]).logits
    assert (whole - exact).abs().max() > 0.01
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-4)


def test_keys_are_blocked_in_the_order_that_gguf_stores_them() -> None:
    _, description, _ = model_of("llama", head_dim=64)
    assert interleaves_rotary(description.gguf_architecture)
    keys = torch.zeros(1, 1, 1, 64)
    keys[..., 0], keys[..., 40] = 1.0, 100.0  # pairs 0 and 8: both in the first block
    keys[..., 20] = 1.0  # pair 20: in the second
    rounding = CacheRounding(description, CachePair.parse("q8_0"))
    rounded, values = rounding(keys, keys, 0)
    coarse, fine = abs(rounded[..., 0] - 1), abs(rounded[..., 20] - 1)
    assert float(coarse) > 0.01 > float(fine)  # 100/127 a step, and 1/127
    # Values are not rotated: there 0 and 20 share a block, and 40 is in the other.
    assert float(abs(values[..., 0] - 1)) < 0.01


def test_cache_types_that_do_not_tile_a_head_are_refused() -> None:
    _, description, _ = model_of("llama")
    with pytest.raises(ConfigError, match="heads of 16 values do not split"):
        CacheRounding(description, CachePair.parse("q8_0/f16"))


def test_fp8_needs_scales() -> None:
    _, description, _ = model_of("llama")
    with pytest.raises(ConfigError, match=r"needs the scales of kv_cache\.scheme"):
        CacheRounding(description, CachePair.parse("fp8"))


def test_observing_changes_nothing_and_sees_every_token() -> None:
    model, _, _ = model_of("llama")
    seen: list[int] = []
    cache = ObservingCache(lambda keys, _: seen.append(keys.shape[2]))
    with torch.no_grad():
        watched = model(WINDOWS, past_key_values=cache).logits
        plain = model(WINDOWS).logits
    assert seen == [WINDOWS.shape[1]] * 3
    torch.testing.assert_close(watched, plain, rtol=0, atol=1e-5)


def test_generation_takes_the_cache(tmp_path: Path) -> None:
    model, description, _ = model_of("llama", **HEADS_OF_32)
    rounding = CacheRounding(description, CachePair.parse("q8_0/q4_0"))
    cache = FakeQuantCache(rounding)
    tokens = model.generate(
        WINDOWS[:1], past_key_values=cache, max_new_tokens=4, do_sample=False
    )
    assert cache.get_seq_length() == tokens.shape[1] - 1


@pytest.mark.parametrize(
    ("name", "bits"), [("f16", 16), ("q8_0/q4_0", 6.5), ("q5_1", 6)]
)
def test_pairs_are_read_from_their_names(name: str, bits: float) -> None:
    pair = CachePair.parse(name)
    assert pair.bits == bits
    assert CachePair.parse(pair.name) == pair


def test_unknown_types_are_named() -> None:
    with pytest.raises(ConfigError, match="'q8_1'; did you mean 'q8_0'"):
        CachePair.parse("f16/q8_1")
