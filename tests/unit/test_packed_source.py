"""PackedSource: what we wrote, read as dense tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from export_fixtures import linears, make_artifact
from safetensors.torch import load_file, save_file

from compress.core.compressed_tensors import (
    group_entry,
    layout_of,
    scheme_of_group,
    weight_arguments,
)
from compress.core.errors import CheckpointError
from compress.core.scheme import Scheme
from compress.export.safetensors import SafetensorsExporter, SafetensorsOptions
from compress.model.quantized_source import PackedSource, packed_scheme

LAYER = "model.layers.1.mlp.down_proj"


def write(folder: Path, scheme: str = "int4-g32", size: str = "5GB", **options):
    artifact = make_artifact(linears(scheme), **options)
    SafetensorsExporter(SafetensorsOptions(max_shard_size=size)).write(artifact, folder)
    return artifact


def edit(folder: Path, **changes: object) -> None:
    """Change keys of the quantization config."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("size", ["5GB", "15KB"])
@pytest.mark.parametrize("scheme", ["int2", "int3-g32", "int5-asym", "int4-g32-asym"])
def test_weights_are_what_the_codes_say(scheme: str, size: str, tmp_path: Path) -> None:
    artifact = write(tmp_path, scheme, size, dtype="bfloat16")
    source = PackedSource(tmp_path)
    assert list(source.tensors()) == list(artifact.description.tensors)
    for name, info in source.tensors().items():
        tensor, layer = source.read(name), name.removesuffix(".weight")
        assert tuple(tensor.shape) == info.shape
        assert str(tensor.dtype) == f"torch.{info.dtype}"
        if layer in artifact.plan.layers:
            assert torch.equal(tensor, artifact.quantized(layer).dequantize())
        else:
            assert torch.equal(tensor, artifact.source.read(name))


def test_the_consuming_library_decodes_the_same(tmp_path: Path) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    write(tmp_path, "int6-g32")
    stored = load_file(tmp_path / "model.safetensors")
    shape = torch.Size(stored[f"{LAYER}.weight_shape"].tolist())
    codes = helpers.unpack_from_int32(stored[f"{LAYER}.weight_packed"], 6, shape)
    scale = stored[f"{LAYER}.weight_scale"].repeat_interleave(32, dim=1)
    found = PackedSource(tmp_path).read(f"{LAYER}.weight")
    assert torch.equal(found, codes.float() * scale)


def test_schemes_are_listed_by_layer(tmp_path: Path) -> None:
    artifact = write(tmp_path, "int4-g32-asym", scale_dtype="float16")
    expected = {name: layer.scheme for name, layer in artifact.plan.layers.items()}
    assert packed_scheme(tmp_path) == expected


@pytest.mark.parametrize(
    "name",
    [
        "int2",
        "int7-asym",
        "int4-g128",
        "int8-g32-asym",
        "w8a8",
        "w8a8-asym",
        "w6a8-g128",
        "w6a8-g128-group",
        "w4afp8-g128",
        "fp8",
        "fp8-g64",
        "fp8-tensor",
        "fp8-w8a8",
        "fp8-block",
        "mxfp4",
        "mxfp6",
        "mxfp8",
        "nvfp4",
        "nvfp4-w4a4",
        "fp4-g32",
        "w4a8-fp-g128",
        "fp4-g128-pow2",
    ],
)
def test_a_scheme_survives_the_config(name: str) -> None:
    scheme = Scheme.parse(name).with_scales("bfloat16")
    group, layout = group_entry(scheme, ["x"]), layout_of(scheme)
    stored = layout.tensors(scheme, (256, 256))["weight_scale"].dtype
    assert scheme_of_group(group, layout.format, stored) == scheme


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq'"),
        ({"config_groups": {}}, "no groups"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "preset"),
        (
            {"config_groups": {"g": {"weights": {}, "format": "marlin-24"}}},
            "format 'marlin-24'",
        ),
        (
            {"config_groups": {"g": {"weights": {}, "output_activations": {"a": 1}}}},
            "quantized outputs",
        ),
        ({"transform_config": {"config_groups": {"R4": {}}}}, "transform_config"),
        (
            {
                "config_groups": {
                    "g": {
                        "weights": {"num_bits": 4, "group_size": 32},
                        "input_activations": {"dynamic": True, "num_bits": 3},
                        "targets": ["Linear"],
                    }
                }
            },
            "inputs of 3 bits",
        ),
        (
            {"config_groups": {"g": {"weights": {"num_bits": 4}, "targets": ["x"]}}},
            "no config group of config.json targets it",
        ),
        (
            {
                "config_groups": {
                    "g": {
                        "weights": {"num_bits": 4, "strategy": "tensor"},
                        "targets": ["Linear"],
                    }
                }
            },
            "strategy 'tensor'",
        ),
    ],
)
def test_other_formats_are_refused_by_name(changes, message, tmp_path: Path) -> None:
    write(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        PackedSource(tmp_path)


@pytest.mark.parametrize(
    "targets", [["Linear"], [r"re:.*layers\.\d+\..*proj$"], ["re:.*(self_attn|mlp)"]]
)
def test_targets_may_be_classes_or_patterns(targets, tmp_path: Path) -> None:
    artifact = write(tmp_path)
    arguments = weight_arguments(Scheme.parse("int4-g32"))
    edit(tmp_path, config_groups={"g": {"targets": targets, "weights": arguments}})
    found = PackedSource(tmp_path).read(f"{LAYER}.weight")
    assert torch.equal(found, artifact.quantized(LAYER).dequantize())


@pytest.mark.parametrize(
    ("suffix", "tensor"),
    [
        ("weight_shape", torch.tensor([64, 127])),
        ("weight_shape", torch.tensor([64, 128, 1])),
        ("weight_scale", torch.zeros(64, 3)),
        ("weight_packed", torch.zeros(64, 1, dtype=torch.int32)),
    ],
)
def test_shapes_that_disagree_are_damage(suffix, tensor, tmp_path: Path) -> None:
    write(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored[f"{LAYER}.{suffix}"] = tensor
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="damaged"):
        PackedSource(tmp_path)


def test_missing_scales_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored[f"{LAYER}.weight_scale"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{LAYER}: weight_scale is missing"):
        PackedSource(tmp_path)


def test_a_dense_folder_and_an_unknown_name_are_errors(tmp_path: Path) -> None:
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    dense.mkdir()
    packed.mkdir()
    SafetensorsExporter().write(make_artifact(lambda _: None), dense)
    with pytest.raises(CheckpointError, match="no quantization_config"):
        PackedSource(dense)
    write(packed)
    with pytest.raises(CheckpointError, match=r"tensor nothing\.weight is missing"):
        PackedSource(packed).read("nothing.weight")
