from __future__ import annotations

import torch

from compress.core.families import family_of
from compress.export.gguf_names import (
    from_gguf_rows,
    name_finder,
    rotary_heads,
    to_gguf_rows,
)

CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_rows_move_as_in_llama_cpp_converter() -> None:
    weight = torch.randn(48, 5, generator=torch.Generator().manual_seed(0))
    expected = weight.reshape(4, 2, 6, 5).swapaxes(1, 2).reshape(48, 5)
    assert torch.equal(to_gguf_rows(weight, 4), expected)


def test_from_gguf_rows_is_inverse() -> None:
    bias = torch.arange(48)
    assert torch.equal(from_gguf_rows(to_gguf_rows(bias, 4), 4), bias)


def test_only_q_and_k_of_llama_are_permuted() -> None:
    llama, qwen = family_of("llama"), family_of("qwen2")
    module = "model.layers.1.self_attn.{}_proj"
    heads = [rotary_heads("llama", llama, CONFIG, module.format(x)) for x in "qkvo"]
    assert heads == [4, 2, 0, 0]
    assert rotary_heads("qwen2", qwen, CONFIG, module.format("q")) == 0
    assert rotary_heads("deci", qwen, CONFIG, module.format("q")) == 4


def test_names_are_those_of_gguf() -> None:
    find = name_finder("qwen3", 2)
    names = ["model.layers.1.self_attn.q_norm.weight", "lm_head.weight", "other.weight"]
    expected = ["blk.1.attn_q_norm.weight", "output.weight", None]
    assert [find(name) for name in names] == expected
