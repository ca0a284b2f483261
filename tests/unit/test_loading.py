"""Opening models: what is accepted, and the words for what is not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import copy_without, save_checkpoint
from safetensors.torch import load_file, save_file

from compress.core.errors import CheckpointError
from compress.model.loading import check_tensors, locate, open_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_checkpoint(folder, dtype=torch.bfloat16)
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to break."""
    return copy_without(checkpoint, tmp_path / "copy")


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def test_a_folder_is_described_without_reading_weights(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.model.sources import SafetensorsSource

    monkeypatch.setattr(SafetensorsSource, "read", None)
    model = open_model(str(checkpoint), cache=tmp_path).description
    assert (model.label, model.family.name, model.dtype) == (
        "tiny",
        "llama",
        "bfloat16",
    )
    assert (model.block_count, model.tied, model.assets) == (2, False, checkpoint)
    assert model.config["head_dim"] == 16


def test_a_tied_head_is_not_listed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tokenizer=False, tie_word_embeddings=True)
    model = open_model(str(tmp_path), cache=tmp_path).description
    assert model.tied
    assert "lm_head.weight" not in model.tensors


def test_defaults_of_a_config_are_filled_in(copy: Path) -> None:
    set_config(copy, head_dim=None, rms_norm_eps=None)
    config = open_model(str(copy), cache=copy).description.config
    assert (config["head_dim"], config["rms_norm_eps"]) == (16, 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_are_rounded_to_the_dtype_that_is_asked_for(
    checkpoint: Path, dtype: str, tmp_path: Path
) -> None:
    handle = open_model(str(checkpoint), dtype=dtype, cache=tmp_path)
    name = "model.norm.weight"
    assert handle.description.dtype == handle.description.tensors[name].dtype == dtype
    stored = load_file(checkpoint / "model.safetensors")[name]
    assert torch.equal(handle.source.read(name), stored.to(getattr(torch, dtype)))


def test_the_tokenizer_is_that_of_the_folder(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = open_model(str(checkpoint), cache=tmp_path).tokenizer()
    text = "In 2024 the cat"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_folder_without_tokenizer_says_so(copy: Path) -> None:
    for path in copy.glob("tokenizer*"):
        path.unlink()
    handle = open_model(str(copy), cache=copy)
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        handle.tokenizer()


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        open_model(str(copy), cache=copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "'bert' is not a supported architecture"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": "mixtra"}, "did you mean 'mixtral'"),
        ({"model_type": None}, "no model_type"),
        ({"dtype": "int8"}, "dtype 'int8'; set model.dtype"),
        ({"hidden_size": "wide"}, r"config\.json: "),
    ],
)
def test_configs_that_cannot_be_used_are_refused(
    copy: Path, changes: dict[str, Any], message: str
) -> None:
    set_config(copy, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_model(str(copy), cache=copy)


def test_text_that_is_no_json_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot read"):
        open_model(str(copy), cache=copy)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json; not a model folder"):
        open_model(str(tmp_path), cache=tmp_path)


@pytest.mark.parametrize("path", ["./nothing", "/no/such/model", "nothing.gguf"])
def test_a_missing_path_is_refused(path: str) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        locate(path)


def test_a_file_that_is_no_gguf_is_refused(copy: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a folder with config.json"):
        locate(str(copy / "model.safetensors"))


def test_an_unknown_builtin_lists_what_there_is() -> None:
    with pytest.raises(CheckpointError, match="there is builtin:smollm2-135m"):
        locate("builtin:llama")


def test_an_id_that_cannot_be_fetched_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"some/model: .*hub: .*no route"):
        locate("some/model")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "lacks model.layers.1.mlp.up_proj"),
        ("lm_head.weight", None, "lacks lm_head.weight"),
        ("model.norm.weight", torch.ones(7), r"norm\.weight has shape \(7,\)"),
    ],
)
def test_missing_and_misshapen_weights_are_named(
    copy: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    path = copy / "model.safetensors"
    state = load_file(path)
    del state[name]
    if tensor is not None:
        state[name] = tensor
    save_file(state, path)
    handle = open_model(str(copy), cache=copy)
    with pytest.raises(CheckpointError, match=message):
        check_tensors(handle)


def test_a_whole_checkpoint_passes(checkpoint: Path, tmp_path: Path) -> None:
    check_tensors(open_model(str(checkpoint), cache=tmp_path))


def test_resident_weights_do_not_need_the_file_again(copy: Path) -> None:
    handle = open_model(str(copy), resident=True, cache=copy)
    first = handle.source.read("model.norm.weight")
    os.unlink(copy / "model.safetensors")
    assert torch.equal(handle.source.read("model.norm.weight"), first)
