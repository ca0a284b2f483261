"""Experts have the checkpoint's names everywhere, and compute what they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_fixtures import EXPERTS, KINDS, expert_layer, opened, save_mixture
from pipeline_fixtures import windows

from compress.core.errors import CheckpointError
from compress.core.families import expert_count, family_of
from compress.model.experts import stacked, unstacked, weight_of
from compress.model.loading import check_tensors
from compress.model.sources import ModuleSource, SafetensorsSource, in_model_order
from compress.model.streaming import StreamedModel
from compress.runtime.load import load

WINDOWS = windows()


def streamed_logits(folder: Path) -> torch.Tensor:
    handle = opened(folder)
    model = StreamedModel(handle.description, handle.source)
    return torch.stack(list(model.logits(WINDOWS)))


def own_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(window[None]).logits for window in WINDOWS])


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = save_mixture(tmp_path, kind)
    expected = own_logits(model)
    assert float(expected.std()) > 0.05
    found = streamed_logits(tmp_path)
    assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max()))


def test_an_ordinary_mlp_may_lie_between_mixtures(tmp_path: Path) -> None:
    changes = {"mlp_only_layers": [0], "num_hidden_layers": 3}
    model = save_mixture(tmp_path, "qwen3_moe", **changes)
    handle = opened(tmp_path)
    check_tensors(handle)
    assert [handle.description.experts(index) for index in range(3)] == [0, 4, 4]
    assert "model.layers.0.mlp.down_proj" in handle.description.linears()
    found, expected = streamed_logits(tmp_path), own_logits(model)
    assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_of_every_expert_is_a_layer(kind: str, tmp_path: Path) -> None:
    save_mixture(tmp_path, kind)
    description = opened(tmp_path).description
    stored = {
        name.removesuffix(".weight")
        for name, info in SafetensorsSource(tmp_path).tensors().items()
        if len(info.shape) == 2
        and ".layers." in name
        and not name.endswith("gate.weight")
    }
    assert set(description.linears()) == stored
    assert len(description.linears()) == 2 * (4 + 4 * 3)


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_files_are_read_as_the_usual_ones(kind: str, tmp_path: Path) -> None:
    model = save_mixture(tmp_path / "usual", kind)
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    names = SafetensorsSource(tmp_path / "stacked").tensors()
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    usual, other = opened(tmp_path / "usual"), opened(tmp_path / "stacked")
    assert dict(other.description.tensors) == dict(usual.description.tensors)
    assert list(other.description.tensors) == list(usual.description.tensors)
    for name in usual.description.tensors:
        assert torch.equal(other.source.read(name), usual.source.read(name)), name


@pytest.mark.parametrize("kind", KINDS)
def test_stacking_undoes_unstacking(kind: str, tmp_path: Path) -> None:
    model = save_mixture(tmp_path, kind)
    family = family_of(kind)
    source = stacked(unstacked(ModuleSource(model), family), family)
    parameters = dict(model.named_parameters())
    assert set(source.tensors()) == set(parameters)
    for name, parameter in parameters.items():
        assert source.tensors()[name].shape == parameter.shape
        assert torch.equal(source.read(name), parameter), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ["gate", "up", "down"])
def test_a_layer_is_a_view_of_the_stacked_parameter(
    kind: str, role: str, tmp_path: Path
) -> None:
    model = save_mixture(tmp_path, kind)
    layer = expert_layer(kind, 1, 2, role)
    view = weight_of(model, family_of(kind), layer)
    stored = SafetensorsSource(tmp_path).read(f"{layer}.weight")
    assert torch.equal(view, stored)
    with torch.no_grad():
        view.zero_()
    assert not weight_of(model, family_of(kind), layer).any()


@pytest.mark.parametrize("kind", KINDS)
def test_load_gives_the_model_of_transformers(kind: str, tmp_path: Path) -> None:
    model = save_mixture(tmp_path, kind)
    assert torch.equal(own_logits(load(tmp_path)), own_logits(model))


def test_experts_keep_the_order_of_their_numbers() -> None:
    family = family_of("mixtral")
    names = [f"{linear.path}.weight" for linear in family.block_linears(12)]
    full = [f"model.layers.0.{name}" for name in names]
    info: Any = object()
    found = in_model_order({name: info for name in sorted(full)}, family)
    assert list(found) == full


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_expert_is_named(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_mixture(tmp_path, kind)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lost = f"{expert_layer(kind, 1, 3, 'up')}.weight"
    del tensors[lost]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"lacks {lost}"):
        check_tensors(opened(tmp_path))
    with pytest.raises(CheckpointError, match=f"{lost} is missing"):
        load(tmp_path)


def test_the_number_of_experts_has_two_names_in_configs(tmp_path: Path) -> None:
    save_mixture(tmp_path, "qwen3_moe")
    config = json.loads((tmp_path / "config.json").read_text())
    count = config.pop("num_local_experts", None) or config.pop("num_experts")
    for name in ("num_experts", "num_local_experts"):
        assert expert_count(config | {name: count}) == 4
        (tmp_path / "config.json").write_text(json.dumps(config | {name: count}))
        assert opened(tmp_path).description.experts(0) == 4
    assert EXPERTS["qwen3_moe"] in opened(tmp_path).description.linears()[4]
