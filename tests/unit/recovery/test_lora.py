"""Low-rank changes: ranks of blocks, what they add, and how they are merged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from moe_fixtures import expert_layer, save_mixture
from recovery_fixtures import opened, options_of, save_pair, text_of

from compress.core.errors import ConfigError, MissingDependencyError
from compress.recovery.lora import LoraWeights, block_ranks
from compress.recovery.models import WholeModel
from compress.recovery.recover import recover


def test_equal_blocks_get_equal_ranks() -> None:
    assert block_ranks([0.3] * 5, 16) == [16] * 5


def test_ranks_follow_importance_and_keep_their_mean() -> None:
    importances = [0.9, 0.1, 0.5, 0.5, 0.7, 0.02]
    ranks = block_ranks(importances, 16)
    assert sum(ranks) == 6 * 16
    assert all(rank % 2 == 0 and 4 <= rank <= 64 for rank in ranks)
    assert ranks[0] > ranks[4] > ranks[2] == ranks[3] > ranks[1] >= ranks[5]


def test_the_limits_of_ranks_are_kept() -> None:
    ranks = block_ranks([1000.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 8)
    assert max(ranks) <= 32 and min(ranks) >= 2 and sum(ranks) == 8 * 8
    assert block_ranks([1e-9, 1.0], 2) == [2, 2]


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_an_importance_is_a_positive_number(bad: float) -> None:
    with pytest.raises(ConfigError, match="positive"):
        block_ranks([1.0, bad], 8)


def lora(folder: Path, *, seed: int = 0, norms: bool = True) -> LoraWeights:
    handle = opened(folder)
    model = WholeModel(handle, device="cpu", dtype=torch.float32)
    return LoraWeights(model, handle, ranks=[2, 4, 6], plus=8.0, norms=norms, seed=seed)


def test_training_begins_at_the_student(tmp_path: Path) -> None:
    _, student = save_pair(tmp_path)
    plain = WholeModel(opened(student), device="cpu", dtype=torch.float32)
    ids = text_of().held_out
    torch.testing.assert_close(
        lora(student).states(ids), plain.states(ids), rtol=0, atol=0
    )


def test_blocks_have_their_own_ranks_and_b_its_own_rate(tmp_path: Path) -> None:
    _, student = save_pair(tmp_path)
    trained = lora(student)
    path = "model.layers.{}.mlp.down_proj.lora_{}"
    for block, rank in enumerate([2, 4, 6]):
        assert trained.parameters[path.format(block, "A")].shape == (rank, 64)
        assert trained.parameters[path.format(block, "B")].shape == (64, rank)
        layer = trained.model.module.get_submodule(path.format(block, "A")[:-7])
        assert layer.scaling == {"default": 2.0}
    assert trained.rates[path.format(0, "B")] == 8.0
    assert path.format(0, "A") not in trained.rates
    assert all(p.dtype == torch.float32 for p in trained.parameters.values())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_have_the_rank_of_their_block(tmp_path: Path, kind: str) -> None:
    save_mixture(tmp_path / "model", kind)
    handle = opened(tmp_path / "model")
    model = WholeModel(handle, device="cpu", dtype=torch.float32)
    trained = LoraWeights(model, handle, ranks=[2, 6], plus=1.0, norms=False, seed=0)
    assert trained.weights <= set(handle.description.tensors)
    for block, rank in enumerate([2, 6]):
        for expert in range(4):
            name = f"{expert_layer(kind, block, expert, 'up')}.lora_A"
            assert trained.parameters[name].shape[0] == rank


def test_a_seed_decides_where_adapters_begin(tmp_path: Path) -> None:
    _, student = save_pair(tmp_path)
    name = "model.layers.0.mlp.up_proj.lora_A"
    first, again, other = (lora(student, seed=s).parameters[name] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_merge_computes_what_adapters_compute(tmp_path: Path) -> None:
    _, student = save_pair(tmp_path)
    trained, handle = lora(student), opened(student)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained.parameters.values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * noise)
    merged = WholeModel(handle, device="cpu", dtype=torch.float32)
    for name in trained.weights:
        value = trained.dense(name, handle.source.read(name))
        merged.module.get_parameter(name).data = value
    ids = text_of().held_out
    torch.testing.assert_close(
        merged.states(ids), trained.states(ids), rtol=1e-4, atol=1e-4
    )
    assert not torch.equal(merged.states(ids), lora(student).states(ids))


def test_a_merge_is_rounded_once(tmp_path: Path) -> None:
    _, student = save_pair(tmp_path)
    trained = lora(student)
    name = "model.layers.1.self_attn.q_proj"
    a, b = (trained.parameters[f"{name}.lora_{part}"] for part in "AB")
    torch.nn.init.normal_(b, std=0.1)
    stored = opened(student).source.read(f"{name}.weight").bfloat16()
    exact = stored.double() + 2 * b.detach().double() @ a.detach().double()
    found = trained.dense(f"{name}.weight", stored)
    assert found.dtype == torch.bfloat16
    # Rounded twice, one in some ten would differ; float32 moves a few over a tie.
    assert float((found == exact.to(torch.bfloat16)).float().mean()) > 0.999


def test_norms_are_left_alone_if_asked(tmp_path: Path) -> None:
    _, student = save_pair(tmp_path)
    assert all("norm" not in name for name in lora(student, norms=False).weights)
    assert "model.norm.weight" in lora(student).weights


def test_without_peft_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = save_pair(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"compress-llm\[recover\]"):
        recover(
            opened(student),
            opened(teacher),
            tmp_path / "out",
            text=text_of(),
            options=options_of(),
            device="cpu",
            state=tmp_path / "state",
        )
