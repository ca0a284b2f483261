from __future__ import annotations

import pytest
import torch
from model_fixtures import random_model
from shapes_fixtures import WIDTHS, uneven_model
from streaming_fixtures import FAMILIES, WINDOWS, model_of

from compress.core.errors import CheckpointError
from compress.core.shapes import has_widths, mlp_widths
from compress.model.padding import padded
from compress.model.streaming import StreamedModel


@pytest.mark.parametrize("kind", FAMILIES)
def test_neurons_of_zeros_compute_nothing(kind: str) -> None:
    _, description, source = uneven_model(kind)
    wide, filled = padded(description, source, multiple=64)
    assert not has_widths(wide.config)
    assert mlp_widths(wide.config) == (128,) * len(WIDTHS)
    assert filled.tensors() == wide.tensors
    for name, info in wide.tensors.items():
        assert tuple(filled.read(name).shape) == info.shape
    before = StreamedModel(description, source).logits(WINDOWS)
    after = StreamedModel(wide, filled).logits(WINDOWS)
    for ours, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_biases_are_filled_too() -> None:
    _, description, source = uneven_model("llama", mlp_bias=True)
    _, filled = padded(description, source)
    bias = filled.read("model.layers.1.mlp.up_proj.bias")
    assert bias.shape == (96,)
    assert torch.equal(bias[:32], source.read("model.layers.1.mlp.up_proj.bias"))
    assert not bias[32:].any()
    assert filled.read("model.layers.1.mlp.down_proj.bias").shape == (64,)


def test_a_model_of_equal_blocks_stays_as_it_is() -> None:
    _, description, source = model_of("llama")
    same, filled = padded(description, source)
    assert same == description
    assert filled.tensors() == source.tensors()


def test_mixtures_are_refused() -> None:
    _, description, source = random_model("mixtral")
    with pytest.raises(CheckpointError, match="mixture of experts"):
        padded(description, source)
