"""Models whose blocks have MLPs of their own width: config, skeleton, folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_fixtures import attention
from shapes_fixtures import WIDTHS, save_uneven, uneven_model
from streaming_fixtures import FAMILIES, SIZES, WINDOWS

import compress
from compress.core.errors import CheckpointError
from compress.core.shapes import (
    MODELING_FILE,
    heads_obstacle,
    memory_config,
    mlp_widths,
    modeling_files,
    stored_config,
    with_widths,
)
from compress.model.loading import check_tensors, open_model
from compress.model.skeleton import build_skeleton
from compress.model.streaming import StreamedModel

# The order of sums differs: eager attention here, another there.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
PLAIN = {"model_type": "llama", "intermediate_size": 96, "num_hidden_layers": 3}


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(WINDOWS).logits
    return logits


def test_equal_widths_leave_no_list() -> None:
    uneven = with_widths(PLAIN, [64, 32, 64])
    assert uneven["intermediate_size"] == 64
    assert mlp_widths(uneven) == (64, 32, 64)
    assert with_widths(uneven, [32, 32, 32]) == PLAIN | {"intermediate_size": 32}
    assert mlp_widths(PLAIN) == (96, 96, 96)


def test_a_config_of_equal_blocks_is_stored_as_it_is() -> None:
    assert stored_config(PLAIN) == memory_config(PLAIN) == PLAIN
    assert modeling_files(PLAIN) == {}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_stored_config_comes_back(kind: str) -> None:
    _, description, _ = uneven_model(kind)
    stored = stored_config(description.config)
    assert stored["model_type"] == f"compress_{kind}"
    back = memory_config(json.loads(json.dumps(stored, default=str)))
    assert back["model_type"] == kind
    assert back["intermediate_size_per_layer"] == list(WIDTHS)
    assert "auto_map" not in back


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size_per_layer": [64, 96]}, "3 blocks need as many"),
        ({"intermediate_size_per_layer": [64, 0, 96]}, r"holds \[0\]"),
        ({"intermediate_size_per_layer": [64, 32, 64]}, "the largest of .* 64"),
        ({"intermediate_size_per_layer": 96}, "is 96"),
        ({"model_type": "compress_mixtral"}, "'mixtral' cannot differ"),
    ],
)
def test_widths_that_make_no_model_are_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        memory_config(PLAIN | change)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_streamed_model_computes_what_the_whole_one_does(kind: str) -> None:
    model, description, source = uneven_model(kind)
    streamed = StreamedModel(description, source)
    for ours, theirs in zip(streamed.logits(WINDOWS), logits_of(model), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("kind", FAMILIES)
def test_heads_that_do_not_divide_the_model(kind: str) -> None:
    changes = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}
    obstacle = heads_obstacle(SIZES | changes | {"model_type": kind})
    if obstacle is not None:
        try:
            build_skeleton(SIZES | changes | {"model_type": kind})
        except CheckpointError as error:
            assert "is not a multiple" in str(error)
            return  # transformers before 5.4 takes it
    model, description, source = uneven_model(kind, **changes)
    streamed = StreamedModel(description, source)
    for ours, theirs in zip(streamed.logits(WINDOWS), logits_of(model), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize(
    ("kind", "tied"), [*((kind, False) for kind in FAMILIES), ("llama", True)]
)
def test_a_folder_opens_in_stock_transformers_and_here(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model, _, _ = save_uneven(tmp_path, kind, tied=tied)
    expected = logits_of(model)
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path, trust_remote_code=True, attn_implementation=attention(kind)
    )
    torch.testing.assert_close(logits_of(stock), expected, **CLOSE)
    loaded = compress.load(tmp_path)
    torch.testing.assert_close(logits_of(loaded), expected, **CLOSE)
    handle = open_model(str(tmp_path), cache=tmp_path / "cache")
    assert mlp_widths(handle.description.config) == WIDTHS
    check_tensors(handle)


def test_a_stock_model_generates_and_is_saved_again(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, _, _ = save_uneven(tmp_path / "one", "llama")
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "one", trust_remote_code=True
    )
    whole = stock.generate(
        WINDOWS[:1], max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    fresh = logits_of_ids(model, whole[:, :-1]).argmax(-1)[:, -6:]
    assert torch.equal(whole[:, -6:], fresh)
    stock.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "two", trust_remote_code=True
    )
    assert torch.equal(logits_of(again), logits_of(stock))


def logits_of_ids(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


def test_code_of_a_folder_is_not_run_here(tmp_path: Path) -> None:
    from gguf_fixtures import save_tokenizer

    save_uneven(tmp_path, "llama")
    save_tokenizer(tmp_path)
    (tmp_path / MODELING_FILE).write_text("raise SystemExit('this code was run')\n")
    handle = open_model(str(tmp_path), cache=tmp_path / "cache")
    assert handle.tokenizer()("a cat")["input_ids"]
    check_tensors(handle)
    compress.load(tmp_path)


def test_a_tensor_of_another_width_is_named(tmp_path: Path) -> None:
    save_uneven(tmp_path, "llama")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size_per_layer": [96, 64, 64]}))
    handle = open_model(str(tmp_path), cache=tmp_path / "cache")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.gate_proj.*\(32, 64\)"):
        check_tensors(handle)


def test_an_unusable_list_names_the_file(tmp_path: Path) -> None:
    save_uneven(tmp_path, "llama")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size_per_layer": [96, 64]}))
    with pytest.raises(CheckpointError, match=r"config\.json: .*3 blocks"):
        open_model(str(tmp_path), cache=tmp_path / "cache")
