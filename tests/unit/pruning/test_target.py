"""How much goes, in every unit; and what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from export_fixtures import StateDictSource
from pruning_fixtures import pruned, pruning_of
from streaming_fixtures import model_of

from compress.config.prune_section import PruneSection
from compress.core.artifact import ModelDescription
from compress.core.errors import ConfigError
from compress.core.shapes import WIDTHS
from compress.model.loading import open_model

NEURON = 3 * 64  # weights of one in a model of width 64


def model(**changes: Any) -> tuple[ModelDescription, StateDictSource]:
    _, description, source = model_of("llama", num_hidden_layers=4, **changes)
    return description, source


def weights_of(description: ModelDescription) -> int:
    return sum(info.elements for info in description.tensors.values())


def left_after(root: Path, **section: Any) -> tuple[int, dict[str, Any]]:
    """Return the weights of the pruned folder, and the record."""
    description, source = model()
    record, _ = pruned(description, source, root, **section)
    handle = open_model(str(root / "pruned"), cache=root)
    return weights_of(handle.description), record


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
@pytest.mark.parametrize("share", [0.1, 0.23])
def test_parameters_are_a_share_of_all_weights(
    share: float, shape: str, tmp_path: Path
) -> None:
    whole = weights_of(model()[0])
    section = {"method": "cfsp", "parameters": share, "shape": shape}
    left, _ = left_after(tmp_path, **section)
    step = 8 * NEURON * (4 if shape == "uniform" else 1)  # all blocks at once, or one
    assert abs(left - (1 - share) * whole) <= step / 2 + NEURON


@pytest.mark.parametrize("ratio", [0.6, 1.0])
def test_an_expansion_ratio_is_the_width(ratio: float, tmp_path: Path) -> None:
    section = {"method": "comp", "expansion_ratio": ratio}  # comp would drop blocks
    _, record = left_after(tmp_path, **section)
    assert record["dropped"] == []
    for block in record["blocks"]:
        assert abs(block["after"] - ratio * 64) <= 4


def test_an_expansion_ratio_holds_beside_blocks_too(tmp_path: Path) -> None:
    section = {"method": "maw", "expansion_ratio": 0.75, "blocks": 1}
    _, record = left_after(tmp_path, **section)
    assert [block["after"] for block in record["blocks"]] == [48, 48, 48]


def test_a_size_is_that_of_the_files(tmp_path: Path) -> None:
    description, source = model()
    whole = 4 * weights_of(description)
    wanted = int(0.8 * whole)
    pruned(description, source, tmp_path, method="maw", size=wanted)
    files = (tmp_path / "pruned").glob("*.safetensors")
    written = sum(file.stat().st_size for file in files)
    headers = 8192
    assert abs(written - wanted) <= 4 * (4 * 4 * NEURON) + headers


def test_sparsity_is_a_share_of_neurons(tmp_path: Path) -> None:
    _, record = left_after(tmp_path, method="maw", sparsity=0.3)
    assert abs(record["neurons"]["after"] - 0.7 * 4 * 96) <= 4 * 4
    assert record["neurons"]["before"] == 4 * 96


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_blocks_and_neurons_together_are_what_is_asked(
    share: float, tmp_path: Path
) -> None:
    section = {"method": "cfsp", "parameters": 0.3, "depth_share": share}
    left, record = left_after(tmp_path, **section)
    whole = weights_of(model()[0])
    expected = {0.0: 0, 0.5: 1, 1.0: 1}[share]  # one of them is a quarter of all
    assert len(record["dropped"]) == expected
    assert abs(left - 0.7 * whole) <= 4 * 4 * NEURON + NEURON


def test_blocks_alone_leave_all_neurons(tmp_path: Path) -> None:
    _, record = left_after(tmp_path, method="cfsp", blocks=1)
    assert [block["after"] for block in record["blocks"]] == [96, 96, 96]
    assert len(record["dropped"]) == 1


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sparsity": 0.9}, "have to stay in each block .* ask for less"),
        ({"blocks": 2}, "2 of 4 blocks would go; at most 1 can.*ask for less"),
        ({"sparsity": 0.02, "blocks": 1}, "sparsity: 0.02 comes to.*leave one"),
        ({"expansion_ratio": 2.0}, "a width of 128, above the model's 96"),
        ({"size": "1GB"}, "the model has .* bytes already"),
        ({"sparsity": 0.01}, "multiples of 8, which leaves all; .* prune.round_to"),
        (
            {"sparsity": 0.3, "budgets": "cfsp"},
            "with shape: uniform all blocks have one width; set shape: per-layer",
        ),
        (
            {
                "sparsity": 0.3,
                "shape": "per-layer",
                "budgets": "measured",
                "repair": "none",
            },
            "measured after the repair.*set repair: least_squares",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_to_do(
    section: dict[str, Any], message: str, tmp_path: Path
) -> None:
    description, source = model()
    with pytest.raises(ConfigError, match=message):
        pruning_of(description, source, tmp_path, **section).provisional()
    assert source.reads == []


@pytest.mark.parametrize("method", ["flap", "maw"])
def test_a_bias_where_the_config_has_none_is_refused(
    method: str, tmp_path: Path
) -> None:
    _, description, source = model_of("qwen2")
    section = {"method": method, "sparsity": 0.3, "repair": "bias"}
    with pytest.raises(ConfigError, match="no bias in its MLP; use least_squares"):
        pruning_of(description, source, tmp_path, **section)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "say how much to remove"),
        ({"sparsity": 0.2, "size": "1GB"}, "sparsity and size contradict"),
        ({"sparsity": 0.2, "blocks": 1, "depth_share": 0.5}, "depth_share and blocks"),
        (
            {"expansion_ratio": 2.0, "depth_share": 0.5},
            "depth_share and expansion_ratio",
        ),
    ],
)
def test_contradictions_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneSection(**section)


def test_what_was_pruned_can_be_pruned_again(tmp_path: Path) -> None:
    """Widths that differ stay so, and one width for all is refused."""
    description, source = model()
    section = {"method": "cfsp", "sparsity": 0.2, "shape": "per-layer"}
    pruned(description, source, tmp_path / "a", **section)
    once = open_model(str(tmp_path / "a/pruned"), cache=tmp_path)
    record, _ = pruned(once.description, once.source, tmp_path / "b", **section)
    before, after = record["neurons"]["before"], record["neurons"]["after"]
    assert before == sum(once.description.config[WIDTHS])
    assert 2 * abs(after - 0.8 * before) <= 8
    with pytest.raises(ConfigError, match="differ in width .* set shape: per-layer"):
        uniform = {**section, "shape": "uniform"}
        pruning_of(
            once.description, once.source, tmp_path / "c", **uniform
        ).provisional()
    only = {"method": "cfsp", "blocks": 1, "shape": "per-layer"}
    record, _ = pruned(once.description, once.source, tmp_path / "d", **only)
    assert all(block["before"] == block["after"] for block in record["blocks"])
