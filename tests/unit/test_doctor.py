"""Faults that others have left in checkpoints are found, and mended only if asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixtures import linears, make_artifact
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from compress.cli import app
from compress.core.errors import CheckpointError, ConfigError
from compress.core.packing import unpack_codes
from compress.doctor.examination import examine, mend, mended_copy
from compress.export.aqlm import AqlmExporter
from compress.export.safetensors import SafetensorsExporter, SafetensorsOptions

KEY = "linear_weights_not_to_quantize"


def packed(folder: Path, scheme: str, size: str = "5GB") -> Path:
    folder.mkdir()
    artifact = make_artifact(linears(scheme))
    SafetensorsExporter(SafetensorsOptions(max_shard_size=size)).write(artifact, folder)
    return folder


def padded(words: Tensor, bits: int, count: int) -> Tensor:
    """Pack the codes of dense rows as releases before 0.18 did, number by number."""
    each = 32 // bits
    found = []
    for row in unpack_codes(words, bits, count).tolist():
        row += [0] * (-len(row) % each)
        total = [
            sum(code << (bits * place) for place, code in enumerate(row[n : n + each]))
            for n in range(0, len(row), each)
        ]
        found.append([word - (1 << 32) if word >> 31 else word for word in total])
    return torch.tensor(found, dtype=torch.int32)


def make_old(folder: Path, bits: int) -> None:
    """Turn a folder of ours into what an old release would have written."""
    files = sorted(folder.glob("*.safetensors"))
    shapes = {
        name.rpartition(".")[0]: tensor.tolist()
        for file in files
        for name, tensor in load_file(file).items()
        if name.endswith(".weight_shape")
    }
    for file in files:
        tensors = load_file(file)
        for name, tensor in tensors.items():
            layer, _, leaf = name.rpartition(".")
            if leaf == "weight_packed":
                tensors[name] = padded(tensor, bits, shapes[layer][1])
            elif leaf == "weight_zero_point":
                old = padded(tensor.t().contiguous(), bits, shapes[layer][0])
                tensors[name] = old.t().contiguous()
        save_file(tensors, file, {"format": "pt"})


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        # Some releases of safetensors leave tensors in the file, which is written anew.
        found |= {name: t.clone() for name, t in load_file(file).items()}
    return found


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


@pytest.mark.parametrize("zero", ["", "-asym"])
@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_padded_packing_is_mended_to_the_same_codes(
    bits: int, zero: str, tmp_path: Path
) -> None:
    folder = packed(tmp_path / "model", f"int{bits}-g32{zero}", size="40KB")
    sound = weights(folder)
    make_old(folder, bits)
    old = contents(folder)
    faults = examine(folder)
    assert {fault.kind for fault in faults} == {"padded-packing"}
    assert f"{bits} bits" in faults[0].text
    assert mended_copy(folder, tmp_path / "mended") == []
    assert contents(folder) == old
    mended = weights(tmp_path / "mended")
    assert mended.keys() == sound.keys()
    assert all(torch.equal(mended[name], sound[name]) for name in sound)
    index = json.loads((tmp_path / "mended/model.safetensors.index.json").read_text())
    total = sum(t.numel() * t.element_size() for t in mended.values())
    assert index["metadata"]["total_size"] == total


def test_mending_that_was_interrupted_is_completed(tmp_path: Path) -> None:
    folder = packed(tmp_path / "model", "int3-g32", size="40KB")
    sound = weights(folder)
    first = sorted(folder.glob("*.safetensors"))[0]
    kept = first.read_bytes()
    make_old(folder, 3)
    first.write_bytes(kept)  # as if the first file was mended before the kill
    mend(folder)
    assert examine(folder) == []
    assert all(torch.equal(t, sound[name]) for name, t in weights(folder).items())


@pytest.mark.parametrize("lost", [["lm_head"], ["lm_head.weight"], None])
@pytest.mark.parametrize("tied", [False, True])
def test_a_skip_list_gets_both_forms(
    tied: bool, lost: list[str] | None, tmp_path: Path
) -> None:
    artifact = make_artifact(linears("aqlm-2x8g8"), tied=tied, scale_dtype="float16")
    AqlmExporter().write(artifact, tmp_path)
    assert examine(tmp_path) == []
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    sound = set(config["quantization_config"][KEY])
    if lost is None:
        del config["quantization_config"][KEY]
    else:
        config["quantization_config"][KEY] = sorted(sound - set(lost))
    path.write_text(json.dumps(config))
    (fault,) = examine(tmp_path)
    assert fault.kind == "skip-list"
    assert "lm_head" in fault.text
    mend(tmp_path)
    assert examine(tmp_path) == []
    mended = json.loads(path.read_text())
    assert set(mended["quantization_config"][KEY]) == sound
    del mended["quantization_config"], config["quantization_config"]
    assert mended == config


def test_the_command_changes_nothing_without_write(tmp_path: Path) -> None:
    folder = packed(tmp_path / "model", "int3-g32")
    make_old(folder, 3)
    old = contents(folder)
    found = run(folder)
    assert found.exit_code == 1
    assert "padded-packing" in found.output
    assert contents(folder) == old
    written = run(folder, "--write")
    assert written.exit_code == 0, written.output
    assert "no known fault" in written.output
    assert run(folder).exit_code == 0


def test_a_copy_replaces_nothing(tmp_path: Path) -> None:
    folder = packed(tmp_path / "model", "int3-g32")
    make_old(folder, 3)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        mended_copy(folder, tmp_path / "there")
    assert run(folder, "--to", tmp_path / "copy").exit_code == 0


def test_damage_is_named_and_stays(tmp_path: Path) -> None:
    folder = packed(tmp_path / "model", "int3-g32", size="40KB")
    files = sorted(folder.glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:-5])
    (fault,) = examine(folder)
    assert (fault.kind, fault.file, fault.mendable) == ("damage", files[0].name, False)
    files[1].unlink()
    assert any(files[1].name in fault.text for fault in examine(folder))
    result = run(folder, "--write")
    assert result.exit_code == 1
    assert "cannot be mended" in result.output


def test_sound_and_dense_checkpoints_have_no_fault(tmp_path: Path) -> None:
    assert examine(packed(tmp_path / "a", "int4-g32-asym")) == []
    assert examine(packed(tmp_path / "b", "int3-g32")) == []
    with pytest.raises(CheckpointError, match=r"config\.json"):
        examine(tmp_path)
