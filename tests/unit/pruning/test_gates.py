"""Thresholds of blocks, learned by gradients of the KL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixtures import StateDictSource
from grammar_fixtures import WIDTH, grammar, trained_on_grammar
from moe_fixtures import opened, save_mixture
from pruning_fixtures import pruning_of
from streaming_fixtures import WINDOWS, model_of
from torch import Tensor

from compress.core.artifact import ModelDescription
from compress.core.errors import CalibrationError, CompressError, ConfigError
from compress.model.loading import ModelHandle
from compress.pruning.gates import Gates, learned_shares, ranks_of
from compress.pruning.places import mlp_places
from compress.pruning.stage import Pruning
from compress.recovery.losses import linear_kl
from compress.recovery.models import WholeModel

NEURONS = 256


@pytest.fixture(scope="module")
def trained() -> ModelHandle:
    return trained_on_grammar()


def whole(handle: ModelHandle, dtype: torch.dtype = torch.float32) -> WholeModel:
    return WholeModel(handle, device="cpu", dtype=dtype)


def ranks(handle: ModelHandle) -> list[Tensor]:
    """Return ranks by the norms of the columns of ``down``."""
    found = []
    for index in range(handle.description.block_count):
        (place,) = mlp_places(handle.description, index)
        down = handle.source.read(f"{place.down}.weight")
        found.append(ranks_of(down.norm(dim=0)))
    return found


def kl_at(handle: ModelHandle, shares: Sequence[float], text: Tensor) -> float:
    """Return the KL in nats when each block keeps its highest ranks."""
    model = whole(handle)
    own = ranks(handle)
    masks = [(r > 1 - share).float() for r, share in zip(own, shares, strict=True)]
    with torch.no_grad():
        dense = model.states(text)
        with Gates(model, own, 0.5).masking(masks):
            masked = model.states(text)
        return float(linear_kl(masked, model.head, dense, model.head))


def test_ranks_are_even_and_ascend_with_the_scores() -> None:
    found = ranks_of(torch.tensor([3.0, -1.0, 7.0, 3.0]))
    torch.testing.assert_close(found, torch.tensor([0.625, 0.125, 0.875, 0.375]))


def test_protected_neurons_have_the_highest_ranks() -> None:
    found = ranks_of(torch.tensor([3.0, -1.0, 7.0, 3.0]), torch.tensor([1]))
    assert int(found.argmax()) == 1


def test_a_hard_mask_has_the_gradient_of_the_soft_one(trained: ModelHandle) -> None:
    gates = Gates(whole(trained), ranks(trained), 0.7)
    slopes = []
    for hard in (False, True):
        masks = gates.masks(0.05, hard=hard)
        slopes.append(torch.autograd.grad(gates.excess(masks), gates.thresholds)[0])
    values = torch.cat(masks)
    assert set(values.tolist()) == {0.0, 1.0}
    torch.testing.assert_close(slopes[0], slopes[1])


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_every_threshold_has_the_slope_of_the_kl(kind: str, recomputed: bool) -> None:
    _, description, source = model_of(kind)
    handle = ModelHandle(description, source)
    model = whole(handle, torch.float64)
    with torch.no_grad():
        dense = model.states(WINDOWS)
    if recomputed:
        model.checkpoint_blocks()
    gates = Gates(model, ranks(handle), 0.6)

    def kl() -> Tensor:
        with gates.masking(gates.masks(0.1, hard=False)):
            loss = linear_kl(model.states(WINDOWS), model.head, dense, model.head)
            if loss.requires_grad:
                loss.backward()
        return loss.detach()

    kl()
    assert gates.thresholds.grad is not None
    step = 2.0**-6  # exact in float32; the third derivative costs about step^2 / tau^2
    for index, slope in enumerate(gates.thresholds.grad.tolist()):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                gates.thresholds[index] += sign * step
                ends.append(float(kl()))
                gates.thresholds[index] -= sign * step
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=0.05)
        assert slope != 0


def test_masks_are_gone_afterwards(trained: ModelHandle) -> None:
    model = whole(trained)
    text = grammar(2, seed=4)
    gates = Gates(model, ranks(trained), 0.5)
    with torch.no_grad():
        before = model.states(text)
        with gates.masking([torch.zeros_like(r) for r in ranks(trained)]):
            assert not torch.equal(model.states(text), before)
        assert torch.equal(model.states(text), before)


@pytest.mark.parametrize("keep", [0.6, 0.8])
def test_the_budget_is_met_within_a_percent(trained: ModelHandle, keep: float) -> None:
    text = grammar(24, seed=2)
    shares = learned_shares(whole(trained), text, ranks(trained), keep, steps=80)
    assert sum(shares) / len(shares) == pytest.approx(keep, rel=0.01)
    assert min(shares) >= 0.25


def test_it_predicts_better_than_equal_widths(trained: ModelHandle) -> None:
    text, held_out = grammar(24, seed=2), grammar(64, seed=3)
    shares = learned_shares(whole(trained), text, ranks(trained), 0.6, steps=60)
    mean = sum(shares) / len(shares)
    assert kl_at(trained, shares, held_out) < kl_at(trained, [mean] * 3, held_out)


def test_the_same_seed_gives_the_same_widths(trained: ModelHandle) -> None:
    text = grammar(24, seed=2).repeat(1, 8)[:, :128]  # 16 of 24 windows in a step
    found = [
        learned_shares(whole(trained), text, ranks(trained), 0.6, seed=seed, steps=6)
        for seed in (1, 1)
    ]
    assert found[0] == found[1]


def alike() -> tuple[ModelDescription, dict[str, Tensor]]:
    """Return a model whose four blocks can be exchanged.

    Block b adds to channels 16b to 16b + 15, which the head reads for tokens 32b to
    32b + 31 and in the same way for all b. What they add is too small for the next ones
    to see. It grows with a neuron's number by a factor of e^2, in both halves.
    """
    _, description, source = model_of(
        "llama", intermediate_size=NEURONS, num_hidden_layers=4
    )
    state = dict(source.state)
    for name, tensor in source.state.items():
        block, _, rest = name.removeprefix("model.layers.").partition(".")
        if not block.isdecimal():
            continue
        state[name] = source.state[f"model.layers.0.{rest}"].clone()
        if rest.startswith("mlp.down_proj"):
            rows = slice(16 * int(block), 16 * int(block) + 16)
            added = source.state[f"model.layers.0.{rest}"][:16]
            growth = torch.exp(torch.arange(NEURONS // 2) / (NEURONS // 4)).repeat(2)
            state[name] = torch.zeros_like(tensor)
            state[name][rows] = 1e-3 * growth * added / added.norm(dim=0)
        if rest.startswith("self_attn.o_proj"):
            state[name] = torch.zeros_like(tensor)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    state[embedding] = state[embedding][:, :16].repeat(1, 4)
    state[head] = torch.block_diag(*[state[head][:32, :16]] * 4)
    state["model.norm.weight"] = torch.ones(64)
    return description, state


def test_equal_blocks_get_equal_widths() -> None:
    description, state = alike()
    handle = ModelHandle(description, StateDictSource(state))
    model = whole(handle, torch.float64)
    shares = learned_shares(model, WINDOWS, ranks(handle), 0.6, steps=60)
    assert max(shares) - min(shares) < 1.5 / NEURONS  # one neuron


def test_a_redundant_block_is_pruned_first() -> None:
    description, state = alike()
    half = NEURONS // 2
    for role in ("gate", "up"):
        rows = state[f"model.layers.1.mlp.{role}_proj.weight"]
        rows[half:] = rows[:half]
    down = state["model.layers.1.mlp.down_proj.weight"]
    down[:, half:] = down[:, :half]
    down /= 2
    handle = ModelHandle(description, StateDictSource(state))
    model = whole(handle, torch.float64)
    shares = learned_shares(model, WINDOWS, ranks(handle), 0.6, steps=60)
    # Energies grow by e^4 from the lowest rank to the highest, and are half as large
    # here: ln(2) / 4 = 0.17 between the shares, if what goes adds up as noise does.
    assert min(shares[0], *shares[2:]) - shares[1] > 0.1


def test_a_gradient_that_is_not_finite_is_an_error(trained: ModelHandle) -> None:
    model = whole(trained)
    model.blocks[1].mlp.up_proj.weight.fill_(torch.inf)
    with pytest.raises(CalibrationError, match="step 0"):
        learned_shares(model, grammar(4, seed=2), ranks(trained), 0.6, steps=2)


def learned(handle: ModelHandle, folder: Path, **section: Any) -> Pruning:
    how = {"budgets": "learned", "shape": "per-layer", "unit": 4} | section
    return pruning_of(handle.description, handle.source, folder, **how)


@pytest.mark.parametrize("method", ["taylor", "cfsp", "maw"])
def test_any_methods_scores_can_be_ranked(
    trained: ModelHandle, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def shares(
        model: WholeModel,
        windows: Tensor,
        own: Sequence[Tensor],
        keep: float,
        *,
        seed: int,
        steps: int,
    ) -> list[float]:
        seen.extend(own)
        assert keep == pytest.approx(0.75)
        return [1.0, 0.75, 0.5]

    monkeypatch.setattr("compress.pruning.gates.learned_shares", shares)
    pruning = learned(trained, tmp_path, method=method, sparsity=0.25)
    record = pruning.run(grammar(8, seed=2), {})
    assert [block["after"] for block in record["blocks"]] == [96, 72, 48]
    assert all(sorted(r.tolist()) == pytest.approx(EVEN) for r in seen)


EVEN = [(i + 0.5) / WIDTH for i in range(WIDTH)]


def test_less_than_the_floor_is_refused(tmp_path: Path) -> None:
    handle = ModelHandle(*model_of("llama", intermediate_size=256)[1:])
    with pytest.raises(ConfigError, match="a quarter"):
        learned(handle, tmp_path, sparsity=0.8)
    assert learned(handle, tmp_path, sparsity=0.7).needs_windows


def test_a_mixture_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    save_mixture(tmp_path, "mixtral")
    with pytest.raises(CompressError, match="one width"):
        learned(opened(tmp_path), tmp_path, sparsity=0.3).provisional()


def test_a_run_ends_in_widths_of_the_target(
    trained: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.pruning.gates.STEPS", 20)
    pruning = learned(trained, tmp_path, sparsity=0.25)
    record = pruning.run(grammar(8, seed=2), {})
    widths = [block["after"] for block in record["blocks"]]
    assert record["budgets"] == "learned"
    assert sum(widths) == 216 and len(set(widths)) > 1
    assert all(width % 4 == 0 for width in widths)
