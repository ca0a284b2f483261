"""Round to nearest against compressed-tensors: same codes, same scales, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from export_fixtures import skip_if_unknown
from torch import Tensor

from compress.core.scheme import Scheme, Zero
from compress.core.tensors import QuantizedTensor
from compress.quantizers.rtn import RoundToNearest

ROWS, COLUMNS = 96, 256
MX: dict[str, Any] = {
    "type": "float",
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": torch.uint8,
    "zp_dtype": torch.uint8,
}
FP8: dict[str, Any] = {"num_bits": 8, "type": "float"}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "fp8": {**FP8, "strategy": "channel"},
    "fp8-tensor": {**FP8, "strategy": "tensor"},
    "fp8-b32": {**FP8, "strategy": "block", "block_structure": [32, 32]},
    "fp8-g64": {**FP8, "strategy": "group", "group_size": 64},
    "fp4-g64": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 64},
    "nvfp4": {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": torch.float8_e4m3fn,
        "zp_dtype": torch.float8_e4m3fn,
    },
    "mxfp4": {"num_bits": 4, **MX},
    "mxfp6": {"num_bits": 6, **MX},
    "mxfp8": {"num_bits": 8, **MX},
    "int8": {"num_bits": 8, "strategy": "channel"},
    "int4-g64": {"num_bits": 4, "strategy": "group", "group_size": 64},
    "int6-g32-asym": {
        "num_bits": 6,
        "strategy": "group",
        "group_size": 32,
        "symmetric": False,
    },
}


def make_weight(*, zero_row: bool = True) -> Tensor:
    """Return weights of which the groups differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    weight *= torch.exp(torch.randn(ROWS, COLUMNS // 8, generator=generator)).repeat(
        1, 8
    )
    if zero_row:
        weight[3] = 0
    weight[4, :32] = 7.0  # rounds up to the next power of two
    return weight


def extremes(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Return minimum and maximum of whatever shares a scale, as observers do."""
    if args.strategy == "tensor":
        parts, dims = weight, (0, 1)
    elif args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    elif args.strategy == "block":
        assert args.block_structure is not None
        height, width = args.block_structure
        parts = weight.unflatten(0, (-1, height)).unflatten(2, (-1, width))
        dims = (1, 3)
    else:
        parts, dims = weight.unflatten(1, (-1, args.group_size)), (2,)
    return parts.amin(dims), parts.amax(dims)


def ours(name: str) -> tuple[Tensor, QuantizedTensor]:
    scheme = Scheme.parse(name).with_scales("float32")
    # With a zero point the library divides such a row by nothing.
    weight = make_weight(zero_row=scheme.zero is Zero.NONE)
    return weight, RoundToNearest().quantize(weight, scheme, None)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_rounding_is_that_of_compressed_tensors(name: str) -> None:
    skip_if_unknown(name)
    weight, coded = ours(name)
    args = QuantizationArgs(**ARGUMENTS[name])
    multiplier = None
    if args.strategy == "tensor_group":
        multiplier = generate_gparam(weight.min(), weight.max())
        assert coded.outer is not None and torch.equal(coded.outer, multiplier)
    low, high = extremes(weight, args)
    scale, zero = calculate_qparams(low, high, args, global_scale=multiplier)
    call: dict[str, Any] = {
        "args": args,
        "global_scale": multiplier,
        "zero_point": None if args.symmetric else zero,
    }
    levels = quantize(weight.clone(), scale, dtype=torch.float32, **call)
    values = fake_quantize(weight.clone(), scale, **call)

    used = coded.scale if coded.outer is not None else coded.scales()
    if args.strategy in ("block", "tensor"):
        used = used[:: ROWS // scale.shape[0]]
    fed = ((low != 0) | (high != 0)).view_as(scale)  # zeros may have any scale
    assert torch.equal(used.float().view_as(scale)[fed], scale.float()[fed])
    assert torch.equal(coded.scheme.levels.to_levels(coded.codes), levels)
    assert torch.equal(coded.dequantize(), values)
    if coded.zero is not None:
        assert torch.equal(coded.zero.float(), zero.float())


def test_fp8_codes_are_torchs_casts() -> None:
    weight, coded = ours("fp8")
    scale = weight.abs().amax(1, keepdim=True) / 448
    scale[scale == 0] = 1
    cast = (weight / scale).to(torch.float8_e4m3fn)
    assert torch.equal(coded.codes, cast.view(torch.uint8))
    assert torch.equal(coded.dequantize(), cast.float() * scale)
