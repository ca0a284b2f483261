"""Checkpoints as the compressed-tensors library writes them, read by PackedSource."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixtures import skip_if_unknown, tiny_llama
from safetensors.torch import save_file
from torch import Tensor

from compress.core.compressed_tensors import SCALE
from compress.core.errors import CheckpointError
from compress.model.quantized_source import PackedSource

ct = pytest.importorskip("compressed_tensors")
LAYER = "model.layers.0.mlp.down_proj"
# The library's presets, and the scheme that we call them; groups as fit 128 columns.
PRESETS = {
    "W4A16": "int4-g128",
    "W4A16_ASYM": "int4-g128-asym",
    "W6A8": "w6a8-g128",  # which the library keeps a byte each
    "W6A16": "int6-g128",
    "W8A8": "w8a8",
    "FP8_DYNAMIC": "fp8-w8a8",
    "FP8": "fp8-tensor",
    "FP8_BLOCK": "fp8-block",
    "NVFP4A16": "nvfp4",
    "NVFP4": "nvfp4-w4a4",
    "MXFP4A16": "mxfp4",
    "MXFP6A16": "mxfp6",
    "MXFP8A16": "mxfp8",
}


def qparams(weight: Tensor, args: Any) -> dict[str, Tensor]:
    """Scales and zero points by the library's own formulas."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    rows, columns = weight.shape
    found: dict[str, Tensor] = {}
    if args.strategy == "tensor":
        low, high = weight.amin().view(1), weight.amax().view(1)
    elif args.strategy == "block":
        blocks = weight.view(rows // 128, 128, columns // 128, 128)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        groups = weight.view(rows, columns // (args.group_size or columns), -1)
        low, high = groups.amin(-1), groups.amax(-1)
    outer = None
    if args.strategy == "tensor_group":
        outer = generate_gparam(weight.amin(), weight.amax())
        found["weight_global_scale"] = outer
    scale, zero = calculate_qparams(low, high, args, global_scale=outer)
    found["weight_scale"] = scale
    if not args.symmetric:
        found["weight_zero_point"] = zero
    return found


def write_as_the_library(folder: Path, preset: str) -> Tensor:
    """Write a tiny Llama with one coded layer; return what the library decodes."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import (
        QuantizationConfig,
        preset_name_to_scheme,
    )

    state, description = tiny_llama(dtype="bfloat16", hidden=128)
    scheme = preset_name_to_scheme(preset, ["re:.*layers.0.mlp.down_proj$"])
    scheme.format = infer_module_format(torch.nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
    weight = state.pop(f"{LAYER}.weight")
    coded = compressor.compress(
        {"weight": weight, **qparams(weight, scheme.weights)}, scheme
    )
    decoded: Tensor = compressor.decompress(
        {
            # Ours are multiplied in float32; the library takes the scale's type.
            name: t.float() if name == SCALE and t.dtype == torch.bfloat16 else t
            for name, t in coded.items()
        },
        scheme,
    )["weight"]
    inputs = scheme.input_activations
    if inputs is not None and inputs.dynamic is not True:
        kind = "scale" if preset == "FP8" else "global_scale"
        coded[f"input_{kind}"] = torch.ones(1)
    state |= {f"{LAYER}.{name}": t.contiguous() for name, t in coded.items()}
    save_file(state, folder / "model.safetensors")
    quantization = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=scheme.format.value,
        quantization_status="compressed",
        ignore=["lm_head"],
    ).model_dump(mode="json")
    config = {**description.config, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return decoded


@pytest.mark.parametrize("preset", PRESETS)
def test_what_the_library_wrote_is_decoded_alike(preset: str, tmp_path: Path) -> None:
    skip_if_unknown(preset)
    expected = write_as_the_library(tmp_path, preset)
    source = PackedSource(tmp_path)
    assert {k: v.name for k, v in source.schemes.items()} == {LAYER: PRESETS[preset]}
    found = source.read(f"{LAYER}.weight")
    assert torch.equal(found.to(expected.dtype), expected)
    assert all(
        name.endswith("weight") and LAYER not in name or name == f"{LAYER}.weight"
        for name in source.tensors()
    )


def test_static_input_scales_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_as_the_library(tmp_path, "FP8")
    PackedSource(tmp_path)
    assert "static input scales are not applied" in caplog.text


def test_columns_that_were_reordered_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_as_the_library(tmp_path, "W4A16")
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state[f"{LAYER}.weight_g_idx"] = torch.zeros(256, dtype=torch.int32)
    save_file(state, path)
    with pytest.raises(CheckpointError, match="reordered columns are not read"):
        PackedSource(tmp_path)


def test_packing_of_old_releases_is_told_from_damage(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_as_the_library(tmp_path, "W6A16")
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    # Before 0.18 a word held floor(32 / 6) = 5 codes: 52 words for 256 columns, not 48.
    state[f"{LAYER}.weight_packed"] = torch.zeros(128, 52, dtype=torch.int32)
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"compressed-tensors before 0\.18"):
        PackedSource(tmp_path)


def test_codes_with_more_bits_than_the_config_says_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_as_the_library(tmp_path, "W6A8")
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state[f"{LAYER}.weight"][0, 0] = 32
    save_file(state, path)
    with pytest.raises(CheckpointError, match="to 32, w6a8-g128 has -32 to 31"):
        PackedSource(tmp_path).read(f"{LAYER}.weight")
