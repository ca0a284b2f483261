"""Blocks of the cache hold what ggml's own rules put there."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from compress.kvcache.blocks import fake_quantize_blocks
from compress.kvcache.names import CACHE_TYPES

BLOCKS = [n for n, kind in CACHE_TYPES.items() if kind.runtime == "llama.cpp"]


def states() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 50, 64, generator=generator) * 3
    x[0, 0, 0] = 0
    x[0, 0, 1] = 5.0
    return x


@pytest.mark.parametrize("name", BLOCKS)
def test_values_are_those_of_the_gguf_library(name: str) -> None:
    x = states()
    kind = GGMLQuantizationType[name.upper()]
    expected = torch.from_numpy(dequantize(quantize(x.numpy(), kind), kind))
    assert torch.equal(fake_quantize_blocks(x, name), expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_bits_are_those_of_the_stored_bytes(name: str) -> None:
    x = states()
    stored = quantize(x.numpy(), GGMLQuantizationType[name.upper()])
    assert stored.size * 8 / x.numel() == CACHE_TYPES[name].bits


def test_a_minimum_helps_values_that_are_not_centred() -> None:
    x = states() + 4

    def error(name: str) -> float:
        return float((fake_quantize_blocks(x, name) - x).square().mean())

    assert error("q4_1") < error("q4_0")
    assert error("q5_1") < error("q5_0")
