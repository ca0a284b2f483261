"""No transform changes what a model computes, whatever its family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shapes_fixtures import uneven_model
from transforms_fixtures import (
    EVERYWHERE,
    FAMILIES,
    apply,
    chain_of,
    model_of,
    own_logits,
    plan_of,
    streamed_logits,
)

from compress.core.artifact import ModelDescription
from compress.core.errors import PlanError
from compress.core.families import FAMILIES as TABLE
from compress.core.plan import Plan

ALL = ("rotation", "scale_folding", "smoothquant", "awq")
CASES = [((name,), True) for name in ALL] + [(ALL, True), (ALL, False)]


def options_for(kind: str) -> dict[str, Any]:
    gemma = kind.startswith("gemma")
    return {"places": EVERYWHERE, "steps": 4} | ({"residual": False} if gemma else {})


@pytest.mark.parametrize(("names", "tied"), CASES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_no_logit_changes(
    kind: str, names: tuple[str, ...], tied: bool, tmp_path: Path
) -> None:
    model, description, source = model_of(kind, tied=tied)
    expected = own_logits(model)
    chain = chain_of(*names, **options_for(kind))
    seen, made = apply(chain, description, source, tmp_path)
    assert float(expected.std()) > 0.05
    found = streamed_logits(seen, made.source)
    assert float((found - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_blocks_may_differ_in_width(kind: str, tmp_path: Path) -> None:
    model, description, source = uneven_model(kind, vocab_size=256)
    chain = chain_of(*ALL, **options_for(kind))
    seen, made = apply(chain, description, source, tmp_path)
    found, expected = streamed_logits(seen, made.source), own_logits(model)
    assert float((found - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_linear_of_a_place_does_change(kind: str, tmp_path: Path) -> None:
    _, description, source = model_of(kind)
    chain = chain_of("scale_folding", places=EVERYWHERE)
    _, made = apply(chain, description, source, tmp_path)
    norms = {description.family.attention_norm, description.family.mlp_norm}
    paths = {linear.path for linear in description.family.linears} | norms
    for path in paths:
        name = f"{description.family.block(1)}.{path}.weight"
        assert not torch.equal(made.source.read(name), source.state[name]), name


def test_query_heads_that_share_values_share_scales(tmp_path: Path) -> None:
    _, description, source = model_of("llama")  # 4 query heads, 2 key-value heads
    chain = chain_of("scale_folding", places=("value",))
    _, made = apply(chain, description, source, tmp_path)
    name = "model.layers.0.self_attn.o_proj.weight"
    ratio = (made.source.read(name) / source.state[name]).mean(0).view(2, 2, 16)
    assert torch.allclose(ratio[:, 0], ratio[:, 1], rtol=1e-4)
    assert not torch.allclose(ratio[0], ratio[1], rtol=1e-2)


def test_norms_of_queries_and_keys_are_not_touched(tmp_path: Path) -> None:
    for kind in ("qwen3", "gemma3_text"):
        _, description, source = model_of(kind)
        options = options_for(kind)
        chain = chain_of("rotation", "awq", **options)
        _, made = apply(chain, description, source, tmp_path / kind)
        touched = [name for name in made.source.changed if "q_norm" in name]
        assert touched == []


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_a_stream_behind_norms_cannot_be_turned(kind: str) -> None:
    _, description, _ = model_of(kind)
    with pytest.raises(PlanError, match="do not commute.*set residual: false"):
        chain_of("rotation").describe(description)


def test_a_mixture_of_experts_is_refused() -> None:
    from dataclasses import replace

    _, description, _ = model_of("llama")
    experts = next(family for family in TABLE if family.experts)
    with pytest.raises(PlanError, match="mixture of experts.*router"):
        chain_of("awq").describe(replace(description, family=experts))


def described(tied: bool) -> tuple[ModelDescription, ModelDescription]:
    _, description, _ = model_of("llama", tied=tied)
    return description, chain_of("rotation").describe(description)


def test_a_rotation_unties_the_head() -> None:
    before, after = described(tied=True)
    assert before.tied and not after.tied
    assert after.config["tie_word_embeddings"] is False
    assert set(after.tensors) - set(before.tensors) == {"lm_head.weight"}
    assert chain_of("rotation", residual=False).describe(before).tied
    before, after = described(tied=False)
    assert set(after.tensors) == set(before.tensors)


def test_layers_of_the_plan_are_not_rounded_twice(tmp_path: Path) -> None:
    _, description, source = model_of("llama", dtype="bfloat16")
    half = ModelDescription(**{**vars(description), "dtype": "bfloat16"})
    layer = "model.layers.0.mlp.up_proj"
    full = plan_of(half).layers
    plan = Plan("tiny", {layer: full[layer]})
    chain = chain_of("rotation")
    _, made = apply(chain, half, source, tmp_path, plan)
    assert made.source.read(f"{layer}.weight").dtype == torch.float32
    other = made.source.read("model.layers.0.mlp.gate_proj.weight")
    assert other.dtype == torch.bfloat16
    infos = made.source.tensors()
    assert infos[f"{layer}.weight"].dtype == "float32"
    assert all(infos[n].shape == t.shape for n, t in source.tensors().items())


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_norms_in_half_precision_cost_nothing(kind: str, tmp_path: Path) -> None:
    """What a norm's weight loses by rounding, the columns behind it make up for."""
    _, description, source = model_of(kind)
    for name, tensor in source.state.items():
        source.state[name] = tensor.bfloat16().float()
    half = ModelDescription(**{**vars(description), "dtype": "bfloat16"})
    expected = streamed_logits(half, source)
    seen, made = apply(chain_of("smoothquant"), half, source, tmp_path)
    norm = f"model.layers.0.{half.family.mlp_norm}.weight"
    assert made.source.read(norm).dtype == torch.bfloat16
    found = streamed_logits(seen, made.source)
    assert float((found - expected).abs().max()) <= 1e-4
