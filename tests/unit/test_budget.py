"""Bytes of models and plans."""

from __future__ import annotations

from pathlib import Path

import pytest
from export_fixtures import linears, make_artifact, tiny_llama
from moe_fixtures import opened, save_mixture

from compress.core.plan import Plan
from compress.planning.budget import (
    breakdown,
    dense_bytes,
    linear_bits_per_weight,
    parameter_count,
    part_of,
)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_dense_bytes_are_those_of_the_tensors(
    tied: bool, dtype: str, width: int
) -> None:
    state, model = tiny_llama(tied=tied, dtype=dtype)
    count = sum(tensor.numel() for tensor in state.values())
    assert parameter_count(model) == count
    assert sum(dense_bytes(model).values()) == width * count


def test_the_breakdown_loses_nothing() -> None:
    state, model = tiny_llama()
    parts = breakdown(dense_bytes(model), model)
    heads = state["lm_head.weight"].numel() + state["model.embed_tokens.weight"].numel()
    attention = sum(t.numel() for n, t in state.items() if "self_attn" in n)
    mlp = sum(t.numel() for n, t in state.items() if "mlp" in n)
    norms = sum(t.numel() for n, t in state.items() if "norm" in n)
    expected = (heads, attention, mlp, norms)
    assert tuple(parts.values()) == tuple(4 * count for count in expected)


def test_biases_belong_to_their_layer() -> None:
    _, model = tiny_llama()
    assert part_of("model.layers.1.self_attn.q_proj.bias", model) == "attention"
    assert part_of("model.layers.1.input_layernorm.weight", model) == "other"


def test_experts_belong_to_the_mlp(tmp_path: Path) -> None:
    save_mixture(tmp_path, "mixtral")
    model = opened(tmp_path).description
    assert (
        part_of("model.layers.0.block_sparse_moe.experts.3.w2.weight", model) == "mlp"
    )


def test_bits_per_weight_include_scales_and_zero_points() -> None:
    plain = make_artifact(linears("int4-g32"), scale_dtype="float16").plan
    assert linear_bits_per_weight(plain) == 4 + 16 / 32
    asymmetric = make_artifact(linears("int4-g64-asym"), scale_dtype="float32").plan
    assert linear_bits_per_weight(asymmetric) == 4 + (32 + 4) / 64
    assert linear_bits_per_weight(Plan("none", {})) is None
