"""Which layout holds a scheme, and how its config group spells it, both ways.

``config.json`` names a format and describes weights and inputs by ``QuantizationArgs``
for each group of layers. :func:`layout_of` finds the layout of a scheme,
:func:`group_entry` writes the group, :func:`scheme_of_group` reads it back.

Not every scheme has a layout: compressed-tensors 0.20 decodes E4M3, E2M1 (FP4), and
E2M3 (FP6, with scales that are powers of two only), no other float grid, no float
minima and no low-rank corrections. Which combinations its loader in transformers 5.23
takes was found by trying all of them.

Source: compressed-tensors 0.20, ``quantization/quant_args.py``, ``quant_scheme.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.core.compressed_tensors.layout import Layout
from compress.core.compressed_tensors.packed_floats import PackedFloats
from compress.core.compressed_tensors.packed_integers import PackedIntegers
from compress.core.compressed_tensors.plain_codes import PlainCodes
from compress.core.errors import CheckpointError, PlanError
from compress.core.scheme import (
    FLOAT_FORMATS,
    INTEGER,
    SCALE_BITS,
    WHOLE,
    InputScheme,
    Scales,
    Scheme,
    Zero,
)

QUANT_METHOD = "compressed-tensors"
MIXED = "mixed-precision"
NO_CODES = "dense"
_LAYOUTS: dict[str, Layout] = {
    layout.format: layout
    for layout in (
        PackedIntegers("pack-quantized"),
        PlainCodes("int-quantized"),
        PlainCodes("float-quantized"),
        PlainCodes("mxfp8-quantized"),
        PackedFloats("nvfp4-pack-quantized", 4),
        PackedFloats("mxfp4-pack-quantized", 4),
        PackedFloats("mxfp6-pack-quantized", 6),
    )
}
_OF_POWERS = {
    "e2m1": "mxfp4-pack-quantized",
    "e2m3": "mxfp6-pack-quantized",
    "e4m3": "mxfp8-quantized",
}
_OF_FLOATS = {"e2m1": "nvfp4-pack-quantized", "e4m3": "float-quantized"}
_GRIDS = {4: "e2m1", 6: "e2m3", 8: "e4m3"}  # what num_bits means with type float
_SCALE_DTYPES = {Scales.TWO_LEVEL: "torch.float8_e4m3fn", Scales.POWER: "torch.uint8"}


def obstacle(scheme: Scheme) -> str | None:
    """Return why no stock loader reads a scheme, with the remedy; ``None`` if one does.

    A remedy that always works is the exporter's option ``dense``.
    """
    if scheme.rank:
        return (
            f"no stock loader adds the low-rank correction of {scheme.name}; use "
            f"{_without_rank(scheme)}, or set dense: true in this export"
        )
    if scheme.zero is Zero.OFFSET:
        integer = Scheme(scheme.bits, scheme.group_size, Zero.INTEGER)
        return (
            f"no stock loader reads the float minimum of {scheme.name} from "
            f"safetensors; use {Scheme(scheme.bits, scheme.group_size).name} or "
            f"{integer.name}, export to gguf only, or set dense: true in this export"
        )
    if scheme.inputs is not None and _input_obstacle(scheme.inputs):
        return (
            f"no stock loader rounds inputs as {scheme.name} asks; use int8 or e4m3 "
            "inputs, or set dense: true in this export"
        )
    if scheme.scales is Scales.SUPER and scheme.is_integer:
        named = Scheme(scheme.bits, scheme.group_size).name
        return (
            f"no stock loader reads the two levels of scales of {scheme.name} from "
            f"safetensors; use {named}, export to gguf only, or set dense: true in "
            "this export"
        )
    if scheme.is_integer:
        return None
    if scheme.codebook is not None:
        return (
            f"compressed-tensors has no tables, which {scheme.name} needs; export to "
            "another format, or set dense: true in this export"
        )
    if scheme.grid not in _formats(scheme):
        return (
            f"no stock loader reads {scheme.name}; use fp4, fp8, nvfp4, mxfp4 or "
            "mxfp6, or set dense: true in this export"
        )
    if scheme.grid != "e4m3" and scheme.row_block != 1:
        return (
            f"no stock loader reads {scheme.name}: packed floats have scales of single "
            "rows; use fp8, or set dense: true in this export"
        )
    plain = scheme.scales in (Scales.FREE, Scales.RATIO)
    if scheme.grid == "e2m1" and plain and scheme.scale_dtype != "bfloat16":
        return (
            f"loaders round the scales of {scheme.name} to bfloat16, these are "
            f"{scheme.scale_dtype}; set quantize.scale_dtype: bfloat16"
        )
    return None


def layout_of(scheme: Scheme) -> Layout:
    """Return how a scheme is stored.

    Raises:
        PlanError: No stock loader reads it; see :func:`obstacle`.
    """
    problem = obstacle(scheme)
    if problem is not None:
        raise PlanError(problem)
    if not scheme.is_integer:
        return _LAYOUTS[_formats(scheme)[scheme.grid]]
    per_token = scheme.inputs == InputScheme("int8")
    if per_token and scheme.bits == 8 and scheme.group_size is None:
        return _LAYOUTS["int-quantized"]
    return _LAYOUTS["pack-quantized"]


def layout_named(name: str) -> Layout:
    """Return the layout of a format.

    Raises:
        CheckpointError: It is not one that we read.
    """
    if name == "naive-quantized":  # the common base of int- and float-quantized
        name = "float-quantized"
    if name not in _LAYOUTS:
        known = ", ".join(_LAYOUTS)
        raise CheckpointError(f"format {name!r} is not read; {known} are")
    return _LAYOUTS[name]


def as_read(scheme: Scheme) -> Scheme:
    """Return the scheme that a reader finds: ratios are written out as plain scales."""
    if scheme.scales is not Scales.RATIO:
        return scheme
    return Scheme(
        scheme.bits,
        scheme.group_size,
        scale_dtype=scheme.scale_dtype,
        grid=scheme.grid,
        row_block=scheme.row_block,
        inputs=scheme.inputs,
    )


def group_entry(scheme: Scheme, layers: Sequence[str]) -> dict[str, Any]:
    """Return the config group of the layers that have a scheme."""
    inputs = scheme.inputs
    return {
        "targets": list(layers),
        "weights": weight_arguments(scheme),
        "input_activations": None if inputs is None else input_arguments(inputs),
        "output_activations": None,
        "format": layout_of(scheme).format,
    }


def weight_arguments(scheme: Scheme) -> dict[str, Any]:
    """Return the ``weights`` entry of a config group for ``scheme``."""
    strategy = "group" if scheme.group_size else "channel"
    if scheme.row_block != 1:
        strategy = "tensor" if scheme.row_block == WHOLE else "block"
    if scheme.scales is Scales.TWO_LEVEL:
        strategy = "tensor_group"
    grouped = strategy in ("group", "tensor_group")
    arguments: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int" if scheme.is_integer else "float",
        "symmetric": scheme.zero is Zero.NONE,
        "strategy": strategy,
        "group_size": scheme.group_size if grouped else None,
        "dynamic": False,
        "actorder": None,
    }
    if strategy == "block":
        arguments["block_structure"] = [scheme.row_block, scheme.group_size]
    dtype = _SCALE_DTYPES.get(scheme.scales)
    if dtype is not None:
        arguments |= {"scale_dtype": dtype, "zp_dtype": dtype}
    elif scheme.grid == "e2m1":  # the library's default would be E4M3
        arguments["scale_dtype"] = "torch.bfloat16"
    return arguments


def input_arguments(inputs: InputScheme) -> dict[str, Any]:
    """Return the ``input_activations`` entry: scales are made at run time."""
    strategy = "group" if inputs.group_size else "token"
    arguments: dict[str, Any] = {
        "num_bits": inputs.bits,
        "type": "float" if inputs.grid in FLOAT_FORMATS else "int",
        "symmetric": True,
        "strategy": "tensor_group" if inputs.two_level else strategy,
        "group_size": inputs.group_size,
        "dynamic": "local" if inputs.two_level else True,
    }
    if inputs.two_level:
        dtype = _SCALE_DTYPES[Scales.TWO_LEVEL]
        arguments |= {"scale_dtype": dtype, "zp_dtype": dtype}
    return arguments


def scheme_of_group(group: Mapping[str, Any], name: str, scale_dtype: str) -> Scheme:
    """Return the scheme that a config group describes.

    Static input scales, which no scheme of ours has, are left out: ``inputs`` is then
    ``None``.

    Args:
        group: An entry of ``config_groups``.
        name: Its format.
        scale_dtype: Storage type of the scales, as the file has it.

    Raises:
        CheckpointError: It is no scheme that the format holds.
    """
    arguments, layout = group["weights"], layout_named(name)
    inputs = _inputs_of(group.get("input_activations"))
    scheme = _weights_of(arguments, layout.format, scale_dtype, inputs)
    if scheme is None:
        raise CheckpointError(
            f"weights of {arguments.get('num_bits')} bits, type "
            f"{arguments.get('type', 'int')!r}, strategy "
            f"{arguments.get('strategy')!r}, group_size "
            f"{arguments.get('group_size')!r}, scales {scale_dtype!r} are not read "
            f"from {name}"
        )
    return scheme


def _weights_of(
    arguments: Mapping[str, Any],
    name: str,
    scale_dtype: str,
    inputs: InputScheme | None,
) -> Scheme | None:
    bits, kind = arguments.get("num_bits", 0), arguments.get("type", "int")
    group, block = arguments.get("group_size"), arguments.get("block_structure")
    strategy = arguments.get("strategy") or ("group" if group else "tensor")
    if group == -1:  # how the library spells "the whole row"
        strategy, group = "channel", None
    rows = {"tensor": WHOLE}.get(strategy, 1)
    if strategy == "block" and isinstance(block, list) and len(block) == 2:
        rows, group = block
    elif strategy not in ("group", "channel", "tensor_group", "tensor"):
        return None
    if strategy in ("group", "block", "tensor_group"):
        if not isinstance(group, int) or group < 1:
            return None
    else:
        group = None
    if kind == "int":
        fits = name in ("pack-quantized", "int-quantized", "float-quantized")
        fits &= rows == 1 and bits in range(2, 9)
        if not fits or scale_dtype not in SCALE_BITS or strategy == "tensor_group":
            return None
        zero = Zero.NONE if arguments.get("symmetric", True) else Zero.INTEGER
        return Scheme(bits, group, zero, scale_dtype, inputs=inputs)
    if kind != "float" or bits not in _GRIDS or not arguments.get("symmetric", True):
        return None
    grid, scales = _GRIDS[bits], Scales.FREE
    if name == _OF_POWERS[grid]:
        scales, expected = Scales.POWER, scale_dtype == "uint8"
    elif name != _OF_FLOATS.get(grid):
        return None
    elif strategy == "tensor_group":
        scales = Scales.TWO_LEVEL
        expected = scale_dtype == "float8_e4m3fn" and (bits, group) == (4, 16)
    else:
        expected = scale_dtype in SCALE_BITS
    if not expected or (grid != "e4m3" and rows != 1):
        return None
    stored = scale_dtype if scales is Scales.FREE else "bfloat16"
    return Scheme(
        bits,
        group,
        scale_dtype=stored,
        grid=grid,
        scales=scales,
        row_block=rows,
        inputs=inputs,
    )


def _inputs_of(arguments: Mapping[str, Any] | None) -> InputScheme | None:
    if not arguments or arguments.get("dynamic") not in (True, "local"):
        return None
    bits, group = arguments.get("num_bits"), arguments.get("group_size")
    grid = f"{INTEGER}{bits}"
    if arguments.get("type", "int") == "float":
        grid = _GRIDS.get(bits, "")  # type: ignore[arg-type]
    inputs = InputScheme(grid, group, arguments.get("strategy") == "tensor_group")
    if _input_obstacle(inputs) or not arguments.get("symmetric", True):
        raise CheckpointError(f"inputs of {bits} bits, {dict(arguments)}, are not read")
    return inputs


def _input_obstacle(inputs: InputScheme) -> bool:
    return inputs.grid not in ("int4", "int6", "int8", *_GRIDS.values())


def _formats(scheme: Scheme) -> Mapping[str, str]:
    """Return the formats that hold such scales, by grid."""
    if scheme.scales is Scales.POWER:
        return _OF_POWERS
    if scheme.scales is Scales.TWO_LEVEL:
        return {"e2m1": "nvfp4-pack-quantized"}
    return _OF_FLOATS


def _without_rank(scheme: Scheme) -> str:
    return scheme.name.rpartition("-lorc")[0]
