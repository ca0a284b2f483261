"""Layouts of compressed-tensors against that library's own decompressors and schema."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from export_fixtures import round_to_nearest, skip_if_unknown
from torch import Tensor

from compress.core.compressed_tensors import (
    as_read,
    group_entry,
    layout_of,
    obstacle,
    scheme_of_group,
)
from compress.core.errors import CheckpointError, ExportError, PlanError
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor

# Exactly representable in bfloat16 when decoded, which is the type of these formats'
# decompressors; the others decode in the type of the scale.
EXACT = [
    *("int2-g32", "int3", "int4-g32-asym", "int5", "int6-g64", "int7-asym", "int8"),
    *("w8a8", "w8a8-asym", "w8a8-g32", "w6a8-g64", "w6a8-g64-group", "w4afp8-g32"),
    *("fp8", "fp8-w8a8", "fp8-tensor", "fp8-b32", "fp8-g32", "fp8-g64-ratio"),
    *("mxfp4", "mxfp6", "mxfp8", "fp4-g64-pow2", "fp4-pow2", "fp6-g64-pow2"),
    *("fp8-pow2", "fp8-b32-pow2", "mxfp4+e4m3-g64"),
]
ROUNDED = ["nvfp4", "nvfp4-w4a4", "fp4-g32", "fp4", "fp4-g64-ratio", "w4a8-fp-g32"]


def coded(name: str, dtype: str = "bfloat16", rows: int = 72) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(len(name))
    weight = torch.randn(rows, 192, generator=generator) * 0.1
    return round_to_nearest(weight, Scheme.parse(name).with_scales(dtype))


def stored_of(tensor: QuantizedTensor) -> dict[str, Tensor]:
    return layout_of(tensor.scheme).encode(tensor, input_amax=3.0)


def by_the_library(tensor: QuantizedTensor, *, wide: bool) -> Tensor:
    """Decode with compressed-tensors; ``wide`` gives it scales as float32."""
    base = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    skip_if_unknown(tensor.scheme.name)
    entry = group_entry(tensor.scheme, ["x"])
    state = stored_of(tensor)
    if wide and state["weight_scale"].dtype == torch.bfloat16:
        state["weight_scale"] = state["weight_scale"].float()
    scheme = quantization.QuantizationScheme.model_validate(entry)
    decoder = base.BaseCompressor.get_value_from_registry(entry["format"])
    weight: Tensor = decoder.decompress(state, scheme)["weight"]
    return weight


@pytest.mark.parametrize("name", EXACT)
def test_the_library_decodes_exactly_our_values(name: str) -> None:
    tensor = coded(name)
    found = by_the_library(tensor, wide=True)
    assert torch.equal(found.float(), tensor.dequantize())


@pytest.mark.parametrize("name", ROUNDED)
def test_the_library_decodes_our_values_in_bfloat16(name: str) -> None:
    tensor = coded(name)
    found = by_the_library(tensor, wide=False)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, tensor.dequantize(torch.bfloat16))


@pytest.mark.parametrize("name", EXACT + ROUNDED)
def test_codes_and_scales_come_back_bit_for_bit(name: str) -> None:
    tensor = coded(name)
    scheme, layout = tensor.scheme, layout_of(tensor.scheme)
    stored = stored_of(tensor)
    described = layout.tensors(scheme, tensor.shape)
    assert list(stored) == list(described)
    for suffix, info in described.items():
        assert tuple(stored[suffix].shape) == info.shape
        assert str(stored[suffix].dtype) == f"torch.{info.dtype}"
    dtype = described["weight_scale"].dtype
    read = scheme_of_group(group_entry(scheme, ["x"]), layout.format, dtype)
    assert read == as_read(scheme)
    again = layout.decode(stored, read, tensor.shape)
    assert torch.equal(again.codes, tensor.codes)
    assert torch.equal(again.scales(), tensor.scales())
    assert torch.equal(again.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("name", EXACT + ROUNDED)
def test_the_librarys_schema_takes_the_group(name: str) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    skip_if_unknown(name)
    scheme = Scheme.parse(name).with_scales("bfloat16")
    config = {"config_groups": {"g": group_entry(scheme, ["x"])}}
    parsed = quantization.QuantizationConfig.model_validate(config)
    inputs = parsed.config_groups["g"].input_activations
    assert (inputs is None) == (scheme.inputs is None)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("w6a8-g128", "W6A8"),
        ("w8a8", "W8A8"),
        ("int4-g128-asym", "W4A16_ASYM"),
        ("fp8-w8a8", "FP8_DYNAMIC"),
        ("fp8-block", "FP8_BLOCK"),
        ("nvfp4", "NVFP4A16"),
        ("nvfp4-w4a4", "NVFP4"),
        ("mxfp4", "MXFP4A16"),
        ("mxfp6", "MXFP6A16"),
        ("mxfp8", "MXFP8A16"),
        ("w4afp8-g128", "W4AFP8"),
    ],
)
def test_schemes_are_the_librarys_presets(name: str, preset: str) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    skip_if_unknown(name)
    entry = group_entry(Scheme.parse(name), ["x"])
    ours = quantization.QuantizationScheme.model_validate(entry)
    theirs = quantization.preset_name_to_scheme(preset, ["x"])
    keys = {"observer", "observer_kwargs"}
    for part in ("weights", "input_activations"):
        a, b = getattr(ours, part), getattr(theirs, part)
        assert (a is None) == (b is None)
        if a is not None and preset != "W4AFP8":
            assert a.model_dump(exclude=keys) == b.model_dump(exclude=keys)
    if preset == "W4AFP8":  # the library's own has per-channel weights
        assert ours.input_activations.strategy == theirs.input_activations.strategy


def test_fp6_codes_are_packed_as_in_the_library() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.mxfp6.helpers")
    codes = torch.arange(64, dtype=torch.uint8).repeat(2, 1)
    scheme = Scheme.parse("mxfp6")
    scale = torch.full((2, 2), 127, dtype=torch.uint8)
    tensor = QuantizedTensor(codes, scale, None, scheme)
    packed = layout_of(scheme).encode(tensor)["weight_packed"]
    values = helpers.unpack_fp6_from_uint8(packed, 2, 64, torch.float32)
    assert torch.equal(values, tensor.dequantize())
    # -0 and 0 are one value and two codes: all 64 patterns must survive.
    stored = layout_of(scheme).encode(tensor)
    assert torch.equal(layout_of(scheme).decode(stored, scheme, (2, 64)).codes, codes)


def test_the_input_scale_maps_the_largest_input_to_both_levels() -> None:
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    tensor = coded("nvfp4-w4a4")
    found = layout_of(tensor.scheme).encode(tensor, input_amax=7.25)
    amax = torch.tensor(7.25)
    assert torch.equal(
        found["input_global_scale"], helpers.generate_gparam(-amax, amax)
    )


@pytest.mark.parametrize("amax", [None, 0.0, float("nan"), float("inf")])
def test_two_level_inputs_need_a_measured_maximum(amax: float | None) -> None:
    tensor = coded("nvfp4-w4a4")
    with pytest.raises(ExportError, match="largest input of each layer"):
        layout_of(tensor.scheme).encode(tensor, input_amax=amax)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("e3m0-g32", "no stock loader reads e3m0-g32"),
        ("e5m2", "no stock loader reads e5m2"),
        ("fp6-g32", "no stock loader reads fp6-g32"),
        ("fp4-tensor", "scales of single rows"),
        ("int4-g32-lorc8", "use int4-g32, or set dense: true"),
        ("int4-g32-offset", "use int4-g32 or int4-g32-asym"),
        ("q6_k", "use int6-g16, export to gguf only"),
        ("int4-g32+e5m2", "use int8 or e4m3 inputs"),
    ],
)
def test_what_no_loader_reads_is_said_with_a_remedy(name: str, message: str) -> None:
    scheme = Scheme.parse(name).with_scales("bfloat16")
    found = obstacle(scheme)
    assert found is not None
    assert message in found
    assert "dense: true" in found
    with pytest.raises(PlanError):
        layout_of(scheme)


def test_fp4_scales_that_loaders_would_round_are_an_obstacle() -> None:
    found = obstacle(Scheme.parse("fp4-g32").with_scales("float16"))
    assert found is not None
    assert "set quantize.scale_dtype: bfloat16" in found


@pytest.mark.parametrize(
    ("name", "suffix", "value"),
    [
        ("fp8", "weight", 0x7F),
        ("fp8", "weight", 0xFF),
        ("mxfp4", "weight_scale", 0xFF),
        ("nvfp4", "weight_scale", 0x7F),
    ],
)
def test_codes_and_scales_that_are_nan_are_refused(
    name: str, suffix: str, value: int
) -> None:
    tensor = coded(name)
    stored = stored_of(tensor)
    stored[suffix].view(torch.uint8)[0, 0] = value
    with pytest.raises(CheckpointError, match="NaN"):
        layout_of(tensor.scheme).decode(stored, tensor.scheme, tensor.shape)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf")])
def test_a_global_scale_that_is_no_multiplier_is_refused(value: float) -> None:
    tensor = coded("nvfp4")
    stored = {**stored_of(tensor), "weight_global_scale": torch.tensor([value])}
    with pytest.raises(CheckpointError, match="weight_global_scale"):
        layout_of(tensor.scheme).decode(stored, tensor.scheme, tensor.shape)


def test_tensors_of_another_type_are_refused() -> None:
    tensor = coded("mxfp4")
    stored = stored_of(tensor)
    stored["weight_scale"] = stored["weight_scale"].to(torch.int8)
    with pytest.raises(CheckpointError, match=r"weight_scale is int8 .* needs uint8"):
        layout_of(tensor.scheme).decode(stored, tensor.scheme, tensor.shape)


def test_ratios_below_the_scale_type_are_an_error() -> None:
    tensor = coded("fp8-g64-ratio", dtype="float16")
    assert tensor.outer is not None
    small = replace(tensor, outer=torch.full_like(tensor.outer, 6.2e-8))
    small.scale.fill_(3)
    with pytest.raises(ExportError, match="does not fit float16"):
        layout_of(small.scheme).encode(small)
