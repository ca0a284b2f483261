"""Pruning of key-value groups: which go, what takes over, what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from heads_fixtures import (
    FAMILIES,
    WINDOWS,
    kept_groups,
    prune,
    pruning,
    save_heads,
    stock,
    without_groups_,
)
from pipeline_fixtures import digests, logits_of

from compress.core.errors import ConfigError
from compress.core.neurons import NeuronStatistics
from compress.pruning.heads import (
    AttentionPlace,
    choose_by_weight,
    choose_groups,
)
from compress.pruning.repair import repaired_columns
from compress.report.pruning import block_table, pruning_table

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
PLACE = AttentionPlace(
    0, "attention", (("qkv", ("q", "k", "v")),), "o", "o", groups=4, repeats=2, width=3
)
COLUMNS = 4 * 2 * 3


def statistics(inputs: torch.Tensor) -> NeuronStatistics:
    wide = inputs.double()
    gram = (wide.T @ wide / len(wide)).float()
    peak = inputs.abs().amax(0)
    return NeuronStatistics(gram, inputs.mean(0), peak, len(inputs))


def random_case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator)
    inputs = torch.randn(400, COLUMNS, generator=generator) @ mixing
    return torch.randn(10, COLUMNS, generator=generator), inputs


def loss_of(weight: torch.Tensor, inputs: torch.Tensor, kept: list[int]) -> float:
    """Return what is lost without all but some groups, from the outputs themselves."""
    columns = PLACE.columns(torch.tensor(kept))
    change = inputs @ weight.T - inputs[:, columns] @ weight[:, columns].T
    return float(change.square().sum())


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_pruned_folder_is_the_model_without_these_heads(
    kind: str, tmp_path: Path
) -> None:
    model = save_heads(tmp_path / "model", kind)
    record = prune(tmp_path / "model", tmp_path, kv_groups=2, repair="none")
    kept = kept_groups(tmp_path, 2)
    assert all(len(groups) == 2 for groups in kept)
    found = stock(tmp_path / "pruned", dtype=torch.float32)
    assert found.config.num_attention_heads == 4
    assert found.config.num_key_value_heads == 2
    assert found.config.head_dim == 16
    expected = logits_of(without_groups_(model, kept), WINDOWS)
    torch.testing.assert_close(logits_of(found, WINDOWS), expected, **CLOSE)
    assert record["kv_groups"] == {"before": 4, "after": 2, "by": "activations"}


@pytest.mark.parametrize("kind", FAMILIES)
def test_generation_with_a_cache_is_the_full_forward(kind: str, tmp_path: Path) -> None:
    save_heads(tmp_path / "model", kind)
    prune(tmp_path / "model", tmp_path, kv_groups=2)
    model = stock(tmp_path / "pruned", dtype=torch.float32)
    start = WINDOWS[:2, :12]
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": 8}
    tokens = model.generate(start, max_new_tokens=8, use_cache=True, **options)
    logits = logits_of(model, tokens)[:, 11:-1].clone()
    logits[..., model.config.eos_token_id or 0] = -torch.inf  # as min_new_tokens does
    assert torch.equal(logits.argmax(-1), tokens[:, 12:])


def test_each_group_that_goes_is_the_least_loss_beside_those_that_went() -> None:
    for seed in range(5):
        weight, inputs = random_case(seed)
        left = [0, 1, 2, 3]
        for keep in (3, 2, 1):
            choices = [[g for g in left if g != gone] for gone in left]
            left = min(choices, key=lambda c: loss_of(weight, inputs, c))
            found = choose_groups(PLACE, weight, statistics(inputs), keep)
            assert found.tolist() == left


def test_nothing_is_lost_with_a_group_that_says_what_another_does() -> None:
    weight, inputs = random_case()
    inputs[:, 12:18] = 2 * inputs[:, :6]  # group 2 repeats group 0
    columns = PLACE.columns(torch.tensor([1, 2, 3]))
    found = statistics(inputs)
    result = repaired_columns(weight, found, columns, repair="least_squares")
    assert result.error is not None and result.error < 1e-3


def test_without_text_norms_of_v_and_o_decide() -> None:
    weight, values = torch.ones(10, COLUMNS), torch.ones(12, 10)
    weight[:, 6:12] = 0.5
    values[6:9] = 0.1
    assert choose_by_weight(PLACE, weight, values, 3).tolist() == [0, 1, 3]
    assert choose_by_weight(PLACE, weight, values, 2).tolist() == [0, 3]


def test_rows_of_a_fused_matrix_lie_in_three_regions() -> None:
    ((_, parts),) = PLACE.rows
    rows = PLACE.row_indices(parts, torch.tensor([1, 3])).tolist()
    queries = [*range(6, 12), *range(18, 24)]
    keys = [24 + i for i in (3, 4, 5, 9, 10, 11)]
    assert rows == queries + keys + [12 + i for i in keys]


def test_least_squares_lose_less(tmp_path: Path) -> None:
    save_heads(tmp_path / "model")
    errors = {}
    for repair in ("least_squares", "mask", "none"):
        root = tmp_path / repair
        record = prune(tmp_path / "model", root, kv_groups=2, repair=repair)
        errors[repair] = [b["attention_error"] for b in record["blocks"]]
        assert all(b["error"] is None for b in record["blocks"])
    for solved, scaled in zip(errors["least_squares"], errors["mask"], strict=True):
        assert 0 < solved < scaled
    for scaled, cut in zip(errors["mask"], errors["none"], strict=True):
        assert scaled < cut


@pytest.mark.parametrize("method", ["maw", "random"])
def test_methods_without_data_need_no_text(method: str, tmp_path: Path) -> None:
    save_heads(tmp_path / "model")
    made = pruning(tmp_path / "model", tmp_path, kv_groups=2, method=method)
    assert not made.needs_windows
    record = made.run(None, {})
    assert record["kv_groups"] == {"before": 4, "after": 2, "by": "weights"}
    assert stock(tmp_path / "pruned").config.num_key_value_heads == 2


@pytest.mark.parametrize("propagate", ["dense", "pruned"])
def test_heads_neurons_and_blocks_together(propagate: str, tmp_path: Path) -> None:
    save_heads(tmp_path / "model", num_hidden_layers=4)
    section: dict[str, Any] = {
        "sparsity": 0.75,
        "blocks": 1,
        "kv_groups": 2,
        "round_to": 16,
        "propagate": propagate,
    }
    made = pruning(tmp_path / "model", tmp_path, **section)
    record = made.run(WINDOWS, {})
    config = json.loads((tmp_path / "pruned/config.json").read_text())
    promised = made.provisional()
    for key in ("num_hidden_layers", "num_attention_heads", "intermediate_size"):
        assert config[key] == promised.config[key]
    assert (config["num_hidden_layers"], config["num_key_value_heads"]) == (3, 2)
    assert config["intermediate_size"] < 96
    assert all(b["error"] and b["attention_error"] for b in record["blocks"])
    assert stock(tmp_path / "pruned").config.num_attention_heads == 4


@pytest.mark.parametrize("propagate", ["dense", "pruned"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    propagate: str, tmp_path: Path
) -> None:
    save_heads(tmp_path / "model", "qwen2", num_hidden_layers=3)
    section = {"kv_groups": 2, "sparsity": 0.3, "round_to": 16, "propagate": propagate}
    prune(tmp_path / "model", tmp_path, **section)
    folder = tmp_path / "pruned"
    before = digests(folder)
    for name in ("block-0001", "block-0002", "rest"):
        (folder / f"model-{name}.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()
    prune(tmp_path / "model", tmp_path, **section)
    after = digests(folder)
    assert before == after


def test_later_blocks_are_measured_behind_pruned_ones(tmp_path: Path) -> None:
    """The second block's error is what a run of the two models shows."""
    dense = save_heads(tmp_path / "model", "qwen3")
    section = {"kv_groups": 2, "propagate": "pruned"}
    record = prune(tmp_path / "model", tmp_path, **section)
    pruned = stock(tmp_path / "pruned", dtype=torch.float32)
    seen = []
    for model in (pruned, dense):
        model.model.layers[1].self_attn.o_proj.register_forward_hook(
            lambda _module, _inputs, output: seen.append(output)
        )
        logits_of(model, WINDOWS)
        # The dense second block is then fed with what the pruned first one gives.
        dense.model.layers[0] = pruned.model.layers[0]
    error = float((seen[0] - seen[1]).square().sum() / seen[1].square().sum())
    assert record["blocks"][1]["attention_error"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kv_groups": 4}, "have 4, and one has to stay; 2, 3 can go"),
        ({"kv_groups": 1}, "6 heads and hidden_size 64: .*: 2, 3 can go"),
        ({"kv_groups": 2, "repair": "bias"}, "repair bias is for neurons"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    section: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_heads(tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        pruning(tmp_path / "model", tmp_path, **section)


def test_families_that_take_any_number_of_heads_lose_one(tmp_path: Path) -> None:
    save_heads(tmp_path / "model", "qwen3")
    prune(tmp_path / "model", tmp_path, kv_groups=1)
    assert stock(tmp_path / "pruned").config.num_attention_heads == 6


def test_heads_count_in_a_share_of_all_weights(tmp_path: Path) -> None:
    save_heads(tmp_path / "model", tie_word_embeddings=True, intermediate_size=256)
    section = {"parameters": 0.2, "round_to": 1}
    for groups in (0, 2):
        made = pruning(tmp_path / "model", tmp_path, kv_groups=groups, **section)
        left = sum(i.elements for i in made.provisional().tensors.values())
        whole = sum(i.elements for i in made.model.tensors.values())
        assert abs(left - 0.8 * whole) <= 2 * 3 * 64  # a neuron in each block


def test_the_report_shows_heads_only_where_some_went(tmp_path: Path) -> None:
    save_heads(tmp_path / "model")
    record = prune(tmp_path / "model", tmp_path, kv_groups=2)
    report = {"pruning": record}
    rows = {row[0]: row[1:] for row in pruning_table(report).rows}
    assert rows["key-value groups in a block"] == ("4", "2", "50.0 %")
    assert len(block_table(report).headers) == 6
    other = prune(tmp_path / "model", tmp_path / "b", sparsity=0.3, round_to=16)
    names = [row[0] for row in pruning_table({"pruning": other}).rows]
    assert "key-value groups in a block" not in names
    assert len(block_table({"pruning": other}).headers) == 5
