"""The kernels' source, run on a CPU, computes what the reference does.

Copies are done as early and as late as the hardware may; what is only true of a GPU
(its memory order, its assembler) is tested by ``benchmarks/w6a8/check.py``.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from kernel_fixtures import (
    check,
    emulated_kernels,
    exact_of,
    padded,
    values_of,
    weight,
)
from torch import Tensor

from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.runtime.w6a8 import reference
from compress.runtime.w6a8.abi import (
    DTYPES,
    LinearArguments,
    QuantizeArguments,
)
from compress.runtime.w6a8.arguments import Values, linear_arguments
from compress.runtime.w6a8.schedule import Schedule
from compress.runtime.w6a8.tiles import TiledWeight


@pytest.fixture
def library() -> ctypes.CDLL:
    return emulated_kernels()


def run_linear(
    library: ctypes.CDLL,
    given: tuple[Tensor, Tensor],
    weight: TiledWeight,
    cut: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float32,
    bias: Tensor | None = None,
    at_once: bool = False,
) -> Tensor:
    (codes, scales), (tile, splits) = given, cut
    rows = weight.shape[0]
    codes = padded(codes)
    outputs = torch.full((len(codes), rows), 777.0).to(dtype)
    blocks = -(-weight.down // (2 if tile <= 16 else 4)) * 8
    partial = torch.full((splits * len(codes) * rows,), torch.nan)
    tickets = torch.zeros(blocks, dtype=torch.int32)
    group = weight.shape[1] // scales.shape[1]
    arguments = linear_arguments(
        (codes, scales),
        weight,
        outputs,
        Schedule("portable", tile, blocks, splits, len(partial)),
        group,
    )
    arguments.partial, arguments.tickets = partial.data_ptr(), tickets.data_ptr()
    arguments.bias = bias.data_ptr() if bias is not None else None
    library.emulate_linear(ctypes.byref(arguments), int(at_once))
    return outputs


def test_python_and_c_agree_on_the_arguments(library: ctypes.CDLL) -> None:
    assert library.sizes(0) == ctypes.sizeof(QuantizeArguments)
    assert library.sizes(1) == ctypes.sizeof(LinearArguments)


def test_two_blocks_fit_a_multiprocessor(library: ctypes.CDLL) -> None:
    for tile in (32, 64):  # 228 KB on Hopper, 1 KB of which each block costs
        assert 2 * (library.bytes_of_block(tile) + 1024) <= 228 * 1024
        assert library.bytes_of_block(tile) <= 99 * 1024  # a block of sm_86 and sm_89


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize(
    ("columns", "group"), [(160, 160), (97, 97), (100, 100), (160, 32)]
)
def test_inputs_get_the_codes_of_the_reference(
    library: ctypes.CDLL, dtype: torch.dtype, columns: int, group: int
) -> None:
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(0)) * 3
    x[1], x[2, 7], x[3, 9], x[4, 5] = 0.0, torch.nan, -torch.inf, 3e4
    x[0, :32] = 1e-40  # of no account in a row, a group of its own in groups
    x = x.to(dtype)
    codes, scales = run_quantize(library, Values(x), group)
    expected, scale = reference.quantize_activations(x, group)
    assert torch.equal(codes, padded(expected))
    assert torch.equal(scales.nan_to_num(-1), scale.nan_to_num(-1))


def run_quantize(
    library: ctypes.CDLL, values: Values, group: int
) -> tuple[Tensor, Tensor]:
    rows, columns = values.rows, values.columns
    codes = torch.full((rows, -(-columns // 128) * 128), 99, dtype=torch.int8)
    scales = torch.full((rows, columns // group), 99.0)
    tickets = torch.full((300,), 5, dtype=torch.int32)
    arguments = QuantizeArguments(
        values=values.arguments(),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        tickets=tickets.data_ptr(),
        rows=rows,
        padded=codes.shape[1],
        group=group,
        ticket_count=300,
        device=0,
    )
    library.emulate_quantize(ctypes.byref(arguments))
    assert not tickets.any()
    return codes, scales


def are_near(found: tuple[Tensor, Tensor], values: Values, group: int) -> bool:
    """Codes are those of the reference but for a step here and there."""
    codes, scales = reference.quantize_activations(exact_of(values), group)
    apart = (found[0].int() - padded(codes).int()).abs()
    few = int(apart.max()) <= 1 and float(apart.float().mean()) <= 0.01
    return few and torch.allclose(found[1], scales, rtol=2**-7)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("kind", ["norm", "norm_plus_one", "gated"])
@pytest.mark.parametrize(("columns", "group"), [(97, 97), (1160, 1160), (160, 32)])
def test_norms_and_gates_are_rounded_with_what_comes_before(
    library: ctypes.CDLL, kind: str, columns: int, group: int, dtype: torch.dtype
) -> None:
    values = values_of(kind, 3, columns, dtype)
    assert are_near(run_quantize(library, values, group), values, group)


@pytest.mark.parametrize("kind", ["random", "largest", "alternating"])
@pytest.mark.parametrize("run", [32, 64, 128])
@pytest.mark.parametrize("tile", [8, 16, 32, 64])
def test_integer_sums_are_bit_equal(
    library: ctypes.CDLL, tile: int, run: int, kind: str
) -> None:
    m, n, k = tile + 1, 35, 160
    generator = torch.Generator().manual_seed(tile)
    qa = torch.randint(-127, 128, (m, k), generator=generator).to(torch.int8)
    qw = torch.randint(-32, 32, (n, k), generator=generator).to(torch.int8)
    if kind == "largest":
        qa.fill_(-127), qw.fill_(-32)
    elif kind == "alternating":
        qa[:, ::2], qa[:, 1::2], qw[:, ::2], qw[:, 1::2] = 127, -127, -32, 31
    scale = torch.ones(n, 1, dtype=torch.float16)
    tiled = TiledWeight.from_quantized(
        QuantizedTensor(qw, scale, None, Scheme(6, None))
    )
    inputs, ones, outputs = padded(qa), torch.ones(m, 1), torch.zeros(m, n)
    found = torch.full((m, 256 // run, n), 7, dtype=torch.int32)
    arguments = linear_arguments(
        (inputs, ones), tiled, outputs, Schedule("portable", tile, 1), None
    )
    arguments.run, arguments.sums = run, found.data_ptr()
    library.emulate_linear(ctypes.byref(arguments), 0)
    expected = reference.run_sums(inputs, padded(qw), run)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("m", "n", "k", "tile", "of_weight", "of_inputs"),
    [
        (1, 16, 1408, 8, 128, None),
        (3, 17, 1280, 8, 64, None),
        (9, 1, 1312, 16, 32, None),
        (17, 70, 832, 32, None, None),
        (33, 65, 1024, 64, 128, 128),
        (65, 33, 704, 64, 64, 32),
        (2, 40, 1152, 8, None, 64),
        (5, 40, 1280, 16, 256, 128),
    ],
)
def test_results_are_those_of_the_reference(
    library: ctypes.CDLL,
    m: int,
    n: int,
    k: int,
    tile: int,
    of_weight: int | None,
    of_inputs: int | None,
    splits: int,
    at_once: bool,
) -> None:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    given = reference.quantize_activations(x, of_inputs)
    tiled = weight(n, k, of_weight)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(n))
    for add in (None, bias):
        found = run_linear(
            library, given, tiled, (tile, splits), bias=add, at_once=at_once
        )
        check(found, given, tiled, add)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("scales", ["float16", "bfloat16"])
def test_types_of_results_and_scales(
    library: ctypes.CDLL, dtype: torch.dtype, scales: str
) -> None:
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    given = reference.quantize_activations(x, None)
    tiled, bias = weight(20, 256, 128, scales), torch.ones(20, dtype=dtype)
    found = run_linear(library, given, tiled, (8, 2), dtype=dtype, bias=bias)
    check(found, given, tiled, bias)


@pytest.mark.parametrize("group", [None, 32])
def test_a_bad_token_is_nan_and_no_other(
    library: ctypes.CDLL, group: int | None
) -> None:
    x = torch.ones(3, 128)
    x[1, 3] = torch.inf
    given = reference.quantize_activations(x, group)
    found = run_linear(library, given, weight(16, 128, 32), (8, 1))
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


def test_the_cut_changes_only_the_order_of_sums(library: ctypes.CDLL) -> None:
    x = torch.randn(40, 640, generator=torch.Generator().manual_seed(0))
    given, tiled = reference.quantize_activations(x, None), weight(48, 640, 128)
    whole = run_linear(library, given, tiled, (64, 2))
    part = run_linear(library, (given[0][3:4], given[1][3:4]), tiled, (64, 2))
    assert torch.equal(part[0], whole[3])
