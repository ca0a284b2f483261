"""Forms of the cache for study: KIVI and rotated blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.core.errors import ConfigError
from compress.kvcache.blocks import fake_quantize_blocks
from compress.kvcache.cache import CacheRounding
from compress.kvcache.measure import recommended_for_vllm
from compress.kvcache.names import CachePair
from compress.kvcache.studied import fake_quantize_kivi, fake_quantize_rotated


def keys(outlier: float = 1.0) -> Tensor:
    """Return keys ``[1, 2, 64, 64]`` whose channel 5 is larger than the others."""
    states = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    states[..., 5] *= outlier
    return states


def error_of_others(rounded: Tensor, exact: Tensor) -> float:
    gap = (rounded - exact).abs()
    gap[..., 5] = 0
    return float(gap.mean())


def test_keys_in_groups_of_a_channel_do_not_mind_a_large_one() -> None:
    plain, loud = keys(), keys(100.0)
    before = error_of_others(fake_quantize_kivi(plain, 4, is_keys=True), plain)
    after = error_of_others(fake_quantize_kivi(loud, 4, is_keys=True), loud)
    assert after == before
    by_token = error_of_others(fake_quantize_kivi(loud, 4, is_keys=False), loud)
    assert by_token > 5 * before


def test_codes_are_within_half_a_step_of_their_group() -> None:
    states = keys()
    for is_keys in (True, False):
        rounded = fake_quantize_kivi(states, 2, is_keys=is_keys)
        turned = states.transpose(-1, -2) if is_keys else states
        groups = turned.reshape(1, 2, 64, 2, 32)
        step = (groups.amax(-1) - groups.amin(-1)) / 3
        gap = (rounded - states).abs()
        gap = (gap.transpose(-1, -2) if is_keys else gap).reshape(1, 2, 64, 2, 32)
        # Scale and minimum are float16: 2^-11 of magnitudes below 5, three times.
        assert bool((gap.amax(-1) <= step / 2 + 15 * 2.0**-11).all())
        assert rounded.unique().numel() < states.unique().numel() / 4


def test_keys_that_fill_no_group_stay_exact() -> None:
    states = keys()[..., :40, :]
    rounded = fake_quantize_kivi(states, 4, is_keys=True)
    assert torch.equal(rounded[..., 32:, :], states[..., 32:, :])
    assert not torch.equal(rounded[..., :32, :], states[..., :32, :])


def test_rotation_spreads_an_outlier() -> None:
    states = keys(30.0)
    rotated = fake_quantize_rotated(states, "q4_0") - states
    blocks = fake_quantize_blocks(states, "q4_0") - states
    assert rotated.square().mean() < 0.7 * blocks.square().mean()
    # Nothing is lost by turning there and back: 8 bits are as good rotated or not.
    gentle = fake_quantize_rotated(keys(), "q8_0") - keys()
    assert gentle.abs().max() < 0.05


def test_rotation_needs_heads_of_a_power_of_two() -> None:
    from streaming_fixtures import model_of

    _, description, _ = model_of("llama", head_dim=96)
    with pytest.raises(ConfigError, match="no power of two"):
        CacheRounding(description, CachePair.parse("rot4"))


@pytest.mark.parametrize(
    ("name", "runtime", "bits"),
    [
        ("q8_0/q4_0", "llama.cpp", 6.5),
        ("f16", "any", 16),
        ("fp8", "vllm", 8),
        ("kivi4", "none", 5),
        ("q8_0/rot4", "none", 6.5),
    ],
)
def test_a_pair_knows_who_has_it(name: str, runtime: str, bits: float) -> None:
    pair = CachePair.parse(name)
    assert (pair.runtime, pair.bits) == (runtime, bits)


def test_vllm_gets_fp8_only_within_the_limit() -> None:
    entry = {"keys": "fp8", "values": "fp8", "kl": 0.005}
    good = recommended_for_vllm([entry], 0.01)
    bad = recommended_for_vllm([entry], 0.001)
    assert good is not None and good["vllm_flags"] == "--kv-cache-dtype fp8"
    assert bad is not None and bad["vllm_flags"] == "--kv-cache-dtype auto"
    assert recommended_for_vllm([{**entry, "keys": "q8_0"}], 1) is None
