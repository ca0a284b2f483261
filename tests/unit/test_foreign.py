"""What fuzzing found in files of strangers: refused with a message, at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import call, copy_without, save_checkpoint
from safetensors.torch import load_file, save_file

from compress.allocation.journal import Journal
from compress.calibration.sources import load_text
from compress.checksums import checksum, sealed, unsealed
from compress.core.errors import CalibrationError, CheckpointError, PlanError
from compress.core.foreign import parse_json, refusing
from compress.core.plan import Plan
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.model.loading import check_tensors, open_model
from compress.planning.rerun import config_of_export
from compress.recovery.checkpoints import Checkpoint, Progress
from compress.scoring import inspect
from compress.workdir import LayerRecord, WorkDir

DEEP = "[" * 5000 + "]" * 5000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    save_checkpoint(folder)
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return copy_without(whole, tmp_path / "model")


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def opened(folder: Path) -> None:
    handle = open_model(str(folder), cache=folder / "cache")
    check_tensors(handle)


def test_json_that_is_nested_too_deeply_is_no_json() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP.encode())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_deep_files_are_refused(name: str, model: Path) -> None:
    (model / name).write_text(DEEP)
    with pytest.raises(CheckpointError, match=name):
        opened(model)


def test_a_deep_header_is_refused(model: Path) -> None:
    header = DEEP.encode()
    data = len(header).to_bytes(8, "little") + header
    (model / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged safetensors header"):
        opened(model)


def test_a_deep_line_has_a_place(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n' + DEEP)
    with pytest.raises(CalibrationError, match=r"x\.jsonl:2:1: .*nested too deeply"):
        load_text(str(path), None, characters=1)


def test_a_deep_plan_is_none() -> None:
    with pytest.raises(PlanError, match="nested too deeply"):
        Plan.from_json(DEEP)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 2**40),
        ("hidden_size", 10**12),
        ("head_dim", 2**31),
        ("intermediate_size", float("inf")),
        ("num_attention_heads", 10**9),
    ],
)
def test_a_config_of_a_far_larger_model_is_not_built(
    key: str, value: float, model: Path
) -> None:
    change(model / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is .*tensors"):
        opened(model)


@pytest.mark.parametrize(
    "values",
    [{"vocab_size": -2}, {"pad_token_id": 10**6}, {"dtype": ["float32"]}],
)
def test_a_config_that_no_model_has_is_refused(
    values: dict[str, Any], model: Path
) -> None:
    change(model / "config.json", **values)
    with pytest.raises(CheckpointError):
        opened(model)


@pytest.mark.parametrize("shard", ["a" * 5000, "../model.safetensors", "\ud800", "\0"])
def test_names_of_shards_are_not_trusted(shard: str, model: Path) -> None:
    index = {"weight_map": {"model.norm.weight": shard}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="shard"):
        opened(model)
    result = call("inspect", model)  # half a character must not stop the message
    assert result.exit_code == 1
    assert "shard" in result.stderr


@pytest.mark.parametrize("content", ["{}", '{"model": "x"}', '"text"', "[1]"])
def test_a_tokenizer_that_its_library_refuses_is_named(
    content: str, model: Path
) -> None:
    (model / "tokenizer.json").write_text(content)
    handle = open_model(str(model), cache=model / "cache")
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        handle.tokenizer()


@pytest.mark.parametrize("content", ["{", "3", '{"config": 3}', '{"config": {}}'])
def test_a_damaged_report_is_no_finished_run(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"report\.json and plan\.json"):
        config_of_export(tmp_path, "gguf", {})


@pytest.mark.parametrize("content", ["{}", "[]", '{"fingerprint": 3}', "{"])
def test_a_damaged_state_is_said(content: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        WorkDir(tmp_path).begin({"a": "b"}, overwrite=False)


def test_quantization_of_any_form_is_refused(model: Path) -> None:
    for value in (3, [1], {"quant_method": 3}, {"config_groups": 3}):
        change(model / "config.json", quantization_config=value)
        with pytest.raises(CheckpointError):
            inspect(model)


def test_other_errors_of_reading_become_refusals() -> None:
    with (
        pytest.raises(CheckpointError, match="x: damaged, or of a form"),
        refusing("x"),
    ):
        torch.zeros(2).view(3)
    with pytest.raises(ZeroDivisionError), refusing("x"):
        1 / 0  # noqa: B018 - ours


def test_a_journal_with_any_numbers_is_read(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text('[[Infinity], 1.0, 0.5]\n[[0], 1.0, 0.5]\n[3]\n{"a": 1}\n')
    journal = Journal(path, lambda assignment, share: 9.0)
    assert journal([0]) == 0.5
    assert journal([1]) == 9.0


def coded() -> QuantizedTensor:
    scheme = Scheme.parse("int4-g32").with_scales("float32")
    codes = torch.arange(64).remainder(8).view(2, 32).to(torch.int8)
    return QuantizedTensor(codes, torch.ones(2, 1), None, scheme)


def test_a_code_that_has_changed_on_the_disk_is_noticed(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    work.save_part("0000", {"a": coded()}, {"a": LayerRecord(None, 0.1, 0.1)})
    path = tmp_path / "blocks" / "0000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not those that were stored"):
        work.read_layer("0000", "a")


def test_a_record_that_has_changed_on_the_disk_is_noticed(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    work.save_part("0000", {"a": coded()}, {"a": LayerRecord(None, 0.1, 0.1)})
    path = tmp_path / "blocks" / "0000.safetensors"
    path.write_bytes(path.read_bytes().replace(b"int4-g32", b"int4-g16"))
    with pytest.raises(CheckpointError, match="checksum"):
        work.read_layer("0000", "a")


def test_a_training_checkpoint_that_has_changed_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    now, best = {"a": torch.ones(3)}, {"a": torch.zeros(3)}
    Checkpoint(Progress(1.0), now, best, {}).save(file, {"x": "y"})
    assert Checkpoint.load(file, {"x": "y"}) is not None
    tensors = load_file(file)
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    tensors["now/a"][1] = 2.0
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(CheckpointError, match="not those that were stored"):
        Checkpoint.load(file, {"x": "y"})


def test_checksums_tell_names_types_and_shapes_apart() -> None:
    same = {"a": torch.ones(4)}
    others = (
        {"b": torch.ones(4)},
        {"a": torch.ones(2, 2)},
        {"a": torch.ones(4).view(torch.int32)},
        {"a": torch.ones(4) + 1e-6},
    )
    assert checksum(same) == checksum({"a": torch.ones(8)[::2]})
    assert all(checksum(other) != checksum(same) for other in others)


def test_a_text_under_a_seal_is_read_back() -> None:
    assert unsealed(sealed('{"a": 1} x')) == '{"a": 1} x'
    with pytest.raises(ValueError, match="checksum"):
        unsealed(sealed("abc").replace("b", "d"))
