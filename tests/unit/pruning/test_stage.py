"""Whole prunings of tiny models: what must not matter, and what must survive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixtures import StateDictSource
from pipeline_fixtures import digests
from pruning_fixtures import (
    WINDOWS,
    kept_neurons,
    loaded,
    pruned,
    pruning_of,
    random_mlp,
    statistics_of,
)
from safetensors.torch import load_file
from streaming_fixtures import model_of
from torch import Tensor

from compress.core.errors import CheckpointError, ConfigError
from compress.model.loading import check_tensors, open_model
from compress.model.padding import padded
from compress.model.streaming import StreamedModel
from compress.pruners.cfsp import CFSP
from compress.pruning.cutting import choose
from compress.pruning.dealing import Dealer
from compress.pruning.repair import repaired
from compress.pruning.shards import ShardFolder
from compress.registry import names
from compress.workdir import WorkDir

METHODS = names("pruners")
WITH_DATA = [name for name in METHODS if name not in ("maw", "random")]
EVERY_KIND = {
    "uniform": {"method": "taylor", "sparsity": 0.4},
    "per-layer": {"method": "comp", "sparsity": 0.4, "shape": "per-layer"},
    "blocks": {"method": "cfsp", "sparsity": 0.4, "blocks": 1},
    "no data": {"method": "maw", "sparsity": 0.4},
    "on pruned inputs": {"method": "cfsp", "sparsity": 0.4, "propagate": "pruned"},
    "corrected": {"method": "cfsp", "sparsity": 0.4, "propagate": "corrected"},
    "corrected heads": {
        "method": "taylor",
        "sparsity": 0.4,
        "kv_groups": 1,
        "propagate": "corrected",
    },
    "heads": {
        "method": "cfsp",
        "sparsity": 0.4,
        "kv_groups": 1,
        "propagate": "pruned",
    },
    "bias": {
        "method": "flap",
        "sparsity": 0.4,
        "repair": "bias",
        "propagate": "pruned",
    },
}
by_kind = pytest.mark.parametrize("section", EVERY_KIND.values(), ids=EVERY_KIND.keys())


def logits_of(model: Any, windows: Tensor = WINDOWS) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(windows).logits
    return logits


def with_order(source: StateDictSource, order: Tensor) -> StateDictSource:
    """Return the tensors with all neurons in another order."""
    state = dict(source.state)
    for name, tensor in state.items():
        if ".mlp.down_proj." in name:
            state[name] = tensor[:, order]
        elif ".mlp." in name:
            state[name] = tensor[order]
    return StateDictSource(state)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
def test_neurons_of_zeros_go_first_and_nothing_changes(
    method: str, tmp_path: Path
) -> None:
    model, description, source = model_of("llama")
    zeros = torch.randperm(96, generator=torch.Generator().manual_seed(2))[:32]
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate_proj.weight[zeros] = 0
            block.mlp.up_proj.weight[zeros] = 0
            block.mlp.down_proj.weight[:, zeros] = 0
    changed = StateDictSource({n: p.detach() for n, p in model.named_parameters()})
    section = {"method": method, "sparsity": 1 / 3, "depth_share": 0.0}
    _, kept = pruned(description, changed, tmp_path, **section)
    alive = [j for j in range(96) if j not in zeros]
    assert list(kept.values()) == [alive] * 3
    torch.testing.assert_close(
        logits_of(loaded(tmp_path)), logits_of(model), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
def test_the_order_of_neurons_does_not_matter(method: str, tmp_path: Path) -> None:
    _, description, source = model_of("llama")
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    section = {"method": method, "sparsity": 0.4, "depth_share": 0.0}
    _, first = pruned(description, source, tmp_path / "a", **section)
    _, other = pruned(description, with_order(source, order), tmp_path / "b", **section)
    for path, kept in other.items():
        assert sorted(order[kept].tolist()) == first[path]
    torch.testing.assert_close(
        logits_of(loaded(tmp_path / "a")),
        logits_of(loaded(tmp_path / "b")),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("repair", ["least_squares", "mask", "none"])
def test_nothing_to_remove_changes_no_bit(repair: str, tmp_path: Path) -> None:
    _, description, source = model_of("llama", dtype="bfloat16")
    pruned(description, source, tmp_path, method="cfsp", sparsity=0.0, repair=repair)
    found: dict[str, Tensor] = {}
    for shard in (tmp_path / "pruned").glob("*.safetensors"):
        found |= load_file(shard)
    assert found.keys() == source.state.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, source.state[name]), name


@pytest.mark.parametrize("method", ["cfsp", "taylor", "maw", "random", "flap"])
def test_removing_more_never_brings_a_neuron_back(method: str, tmp_path: Path) -> None:
    _, description, source = model_of("llama")
    before = None
    for number, sparsity in enumerate((0.2, 0.4, 0.6)):
        section = {"method": method, "sparsity": sparsity}
        _, kept = pruned(description, source, tmp_path / str(number), **section)
        if before is not None:
            assert all(set(kept[path]) < set(before[path]) for path in kept)
        before = kept


@by_kind
def test_two_prunings_are_the_same_byte_for_byte(
    section: dict[str, Any], tmp_path: Path
) -> None:
    _, description, source = model_of("llama", num_hidden_layers=4)
    pruned(description, source, tmp_path / "a", **section)
    torch.manual_seed(99)
    pruned(description, source, tmp_path / "b", **section)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


@pytest.mark.parametrize("method", WITH_DATA)
def test_the_order_of_windows_does_not_matter(method: str, tmp_path: Path) -> None:
    """Labels are drawn in order, so that taylor is given the same effects."""
    _, description, source = model_of("llama")
    section = {"method": method, "sparsity": 0.4, "depth_share": 0.0}
    order = torch.randperm(len(WINDOWS), generator=torch.Generator().manual_seed(3))
    _, first = pruned(description, source, tmp_path / "a", **section)
    if method == "taylor":
        (tmp_path / "b/pruning").mkdir(parents=True)
        effects = (tmp_path / "a/pruning/gradients.safetensors").read_bytes()
        (tmp_path / "b/pruning/gradients.safetensors").write_bytes(effects)
    windows = WINDOWS[order]
    _, other = pruned(description, source, tmp_path / "b", windows=windows, **section)
    assert first == other


class KilledError(Exception):
    """Stands for the end of the process."""


@by_kind
def test_a_pruning_that_was_killed_goes_on_to_the_same_files(
    section: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, description, source = model_of("llama", num_hidden_layers=4)
    pruned(description, source, tmp_path / "whole", **section)
    save = ShardFolder.save_block

    def save_and_die(self: ShardFolder, index: int, *rest: Any) -> None:
        save(self, index, *rest)
        raise KilledError

    monkeypatch.setattr(ShardFolder, "save_block", save_and_die)
    blocks = 4 - section.get("blocks", 0)
    left = []
    for _ in range(blocks):
        with pytest.raises(KilledError):
            pruned(description, source, tmp_path / "killed", **section)
        folder = tmp_path / "killed/pruned"
        left.append(len(list(folder.glob("*.safetensors"))))
        assert not (folder / "model.safetensors.index.json").exists()
    assert left == list(range(1, blocks + 1))
    monkeypatch.undo()
    pruned(description, source, tmp_path / "killed", **section)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "whole/pruned").iterdir()}
    pruned(description, source, tmp_path / "whole", **section)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_damaged_files_of_a_pruning_are_made_again_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, description, source = model_of("llama", num_hidden_layers=2)
    section = {"method": "taylor", "sparsity": 0.3, "propagate": "pruned"}
    pruned(description, source, tmp_path / "whole", **section)
    pruned(description, source, tmp_path / "torn", **section)
    for name in (
        "pruned/model-rest.safetensors",
        "pruned/model.safetensors.index.json",
    ):
        (tmp_path / "torn" / name).unlink()  # as if it had been killed here
    effects = tmp_path / "torn/pruning/gradients.safetensors"
    effects.write_bytes(effects.read_bytes()[:100])
    pruned(description, source, tmp_path / "torn", **section)
    assert "gradients.safetensors is damaged and made again" in caplog.text
    assert digests(tmp_path / "torn") == digests(tmp_path / "whole")
    (tmp_path / "torn/pruned/model.safetensors.index.json").unlink()
    block = tmp_path / "torn/pruned/model-block-0000.safetensors"
    block.write_bytes(block.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"block-0000.* is damaged .* delete it"):
        pruned(description, source, tmp_path / "torn", **section)


def test_another_pruning_is_refused_in_the_same_folder(tmp_path: Path) -> None:
    _, description, source = model_of("llama")
    pruning = pruning_of(description, source, tmp_path, method="maw", sparsity=0.4)
    pruning.run(None, {"prune": "1"})
    with pytest.raises(ConfigError, match=r"prune changed .*--overwrite"):
        pruning.run(None, {"prune": "2"})


@pytest.mark.parametrize("budget", ["cfsp", "standardised", "effect", "measured"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_widths_add_up_to_the_budget(
    budget: str, sparsity: float, tmp_path: Path
) -> None:
    _, description, source = model_of("llama", num_hidden_layers=4)
    section = {"sparsity": sparsity, "budgets": budget, "shape": "per-layer"}
    record, kept = pruned(description, source, tmp_path, unit=16, **section)
    widths = [block["after"] for block in record["blocks"]]
    assert 2 * abs(sum(widths) - (1 - sparsity) * 4 * 96) <= 16
    assert all(width % 16 == 0 and width >= 32 for width in widths)
    assert [len(neurons) for neurons in kept.values()] == widths
    handle = open_model(str(tmp_path / "pruned"), cache=tmp_path)
    check_tensors(handle)
    assert handle.description.config["compress_pruning"]["method"] == "taylor"


@pytest.mark.parametrize("sparsity", [0.27, 0.45])
def test_measured_budgets_lose_no_more_than_uniform_ones(
    sparsity: float, tmp_path: Path
) -> None:
    """By their own prediction, and at any share, on the ladder or not."""
    _, description, source = model_of("llama", num_hidden_layers=4)
    section = {"sparsity": sparsity, "budgets": "measured", "shape": "per-layer"}
    pruning = pruning_of(description, source, tmp_path, **section)
    dealer = Dealer(pruning, description, source)
    gradients = dealer.gradients(WorkDir(tmp_path), WINDOWS)
    chosen = dealer.widths(WINDOWS, gradients)
    uniform = dealer.dealt([1 - sparsity] * 4)
    assert sum(chosen) == sum(uniform)
    losses: list[list[float]] = []

    def look(_place: Any, mlp: Any, found: Any, slope: float) -> Tensor:
        power = float(((mlp.down @ found.gram) * mlp.down).sum())
        row = []
        for width in (chosen[len(losses)], uniform[len(losses)]):
            stay = choose(pruning.pruner, mlp, found, width)
            error = repaired(mlp, found, stay, "least_squares").error
            row.append(0.5 * slope * power * (error or 0.0))
        losses.append(row)
        return torch.tensor(row)

    dealer._measure(WINDOWS, gradients, look)
    ours, theirs = (sum(column) for column in zip(*losses, strict=True))
    assert ours <= theirs
    assert chosen != uniform


def test_padded_and_per_layer_compute_the_same(tmp_path: Path) -> None:
    _, description, source = model_of("llama")
    section = {"method": "cfsp", "sparsity": 0.4, "shape": "per-layer"}
    record, _ = pruned(description, source, tmp_path, **section)
    assert len({block["after"] for block in record["blocks"]}) > 1
    handle = open_model(str(tmp_path / "pruned"), cache=tmp_path)
    wide = padded(handle.description, handle.source)
    uneven = StreamedModel(handle.description, handle.source)
    for a, b in zip(
        uneven.logits(WINDOWS), StreamedModel(*wide).logits(WINDOWS), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    stock = logits_of(loaded(tmp_path))  # with the code in the folder
    ours = torch.stack(list(uneven.logits(WINDOWS)))
    torch.testing.assert_close(stock, ours, rtol=1e-4, atol=1e-4)


def test_a_twin_is_taken_over_by_its_twin(tmp_path: Path) -> None:
    model, description, source = model_of("llama")
    state = dict(source.state)
    for name, tensor in state.items():
        if ".mlp.down_proj." in name:
            tensor[:, :48] *= 0.5
            tensor[:, 48:] = tensor[:, :48]
        elif ".mlp." in name:
            tensor[48:] = tensor[:48]
    model.load_state_dict(state)
    section = {"method": "comp", "sparsity": 0.5, "depth_share": 0.0}
    _, kept = pruned(description, StateDictSource(state), tmp_path, **section)
    for neurons in kept.values():
        assert sorted(j % 48 for j in neurons) == list(range(48))
    torch.testing.assert_close(
        logits_of(loaded(tmp_path)), logits_of(model), rtol=1e-3, atol=1e-2
    )


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_bias_repair_adds_what_went_on_average(
    has_bias: bool, tmp_path: Path
) -> None:
    model, description, source = model_of("llama", mlp_bias=has_bias)
    section = {"method": "flap", "sparsity": 0.4, "repair": "bias"}
    pruned(description, source, tmp_path, **section)
    found = loaded(tmp_path)
    path = "model.layers.0.mlp.down_proj"
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(
        lambda _m, inputs: seen.append(inputs[0].flatten(0, -2))
    )
    logits_of(model)
    hook.remove()
    kept = kept_neurons(tmp_path)["model.layers.0.mlp"]
    gone = [j for j in range(96) if j not in kept]
    down = model.get_submodule(path)
    expected = seen[0][:, gone].mean(0) @ down.weight[:, gone].T
    if has_bias:
        expected = expected + down.bias
    torch.testing.assert_close(found.get_submodule(path).bias, expected)
    ours, theirs = found.model.layers[0].mlp, model.model.layers[0].mlp
    for name in ("gate_proj", "up_proj"):
        bias = getattr(ours, name).bias
        dense = getattr(theirs, name).bias
        assert torch.equal(bias, dense[kept] if has_bias else torch.zeros_like(bias))
    assert found.config.mlp_bias is True


def test_massive_activations_survive() -> None:
    """Whatever the scores say: a criterion by weights alone would drop them."""
    mlp, x = random_mlp()
    x[:, 5] *= 1e-3
    x[7, 5] = 3e3
    mlp.down[:, 5] = 1e-9
    assert 5 in choose(CFSP(), mlp, statistics_of(x), 8)
    assert 5 not in CFSP().select(mlp, statistics_of(x), 8)
