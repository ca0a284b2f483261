"""The kernel for few tokens, run on a CPU; see ``test_w6a8_emulated``."""

from __future__ import annotations

import ctypes

import pytest
import torch
from kernel_fixtures import (
    check,
    codes_of,
    emulated_kernels,
    exact_of,
    padded,
    values_of,
    weight,
)
from torch import Tensor

from compress.runtime.w6a8 import reference
from compress.runtime.w6a8.abi import FewArguments
from compress.runtime.w6a8.arguments import Values, layer_arguments
from compress.runtime.w6a8.schedule import few_schedule
from compress.runtime.w6a8.tiles import TiledWeight, run_of


@pytest.fixture
def library() -> ctypes.CDLL:
    return emulated_kernels()


def run_few(
    library: ctypes.CDLL,
    given: Values | tuple[Tensor, Tensor],
    weight: TiledWeight,
    cut: tuple[int, int, int],
    *,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    at_once: bool = False,
) -> Tensor:
    inputs = given.inputs if isinstance(given, Values) else given[0]
    outputs = torch.full((len(inputs), weight.shape[0]), 777.0).to(dtype)
    layer = layer_arguments(weight, outputs, None)
    layer.bias = None if bias is None else bias.data_ptr()
    arguments = FewArguments()
    arguments.tiles, arguments.depth, layer.at_once = cut
    layer.splits = 1
    if isinstance(given, Values):
        arguments.values = given.arguments()
    else:
        kept = padded(given[0]), given[1]
        layer.inputs, layer.input_scales = (tensor.data_ptr() for tensor in kept)
    arguments.linear = layer
    library.emulate_few(ctypes.byref(arguments), int(at_once))
    return outputs


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k", "group", "cut"),
    [
        (1, 70, 1408, 128, (4, 6, 2)),
        (3, 128, 1280, 64, (2, 6, 3)),
        (8, 65, 1312, 32, (1, 12, 4)),
        (9, 33, 832, None, (2, 6, 1)),
        (16, 64, 1024, 256, (4, 12, 9)),
        (2, 1, 160, 32, (1, 6, 132)),
    ],
)
def test_results_are_those_of_the_reference(
    library: ctypes.CDLL,
    m: int,
    n: int,
    k: int,
    group: int | None,
    cut: tuple[int, int, int],
    at_once: bool,
) -> None:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    given, tiled = reference.quantize_activations(x, None), weight(n, k, group)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(n))
    for dtype, add in ((torch.float32, None), (torch.bfloat16, bias.bfloat16())):
        found = run_few(
            library, given, tiled, cut, dtype=dtype, bias=add, at_once=at_once
        )
        check(found, given, tiled, add)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "norm", "norm_plus_one", "gated"])
@pytest.mark.parametrize(("m", "k"), [(1, 1408), (3, 832), (9, 1280)])
def test_it_rounds_its_inputs_itself(
    library: ctypes.CDLL, m: int, k: int, kind: str, dtype: torch.dtype
) -> None:
    values, tiled = values_of(kind, m, k, dtype), weight(33, k, 64)
    found = run_few(library, values, tiled, (2, 6, 2), dtype=dtype)
    codes = reference.quantize_activations(exact_of(values), None)
    expected = run_few(library, codes, tiled, (2, 6, 2), dtype=dtype)
    if kind in ("plain", "gated"):
        assert torch.equal(found, expected)
    # A norm may fall on the other side of a tie.
    off = (found.float() - expected.float()).norm() / expected.float().norm()
    assert float(off) <= 4e-3


def test_integers_are_added_exactly(library: ctypes.CDLL) -> None:
    generator = torch.Generator().manual_seed(0)
    qa = torch.randint(-127, 128, (5, 640), generator=generator).to(torch.int8)
    tiled = weight(48, 640, 128)
    tiled.scales.fill_(1)
    given = qa, torch.ones(5, 1)
    found = run_few(library, given, tiled, (1, 6, 2), dtype=torch.float32)
    exact = qa.double() @ codes_of(tiled)[0].double().t()
    assert torch.equal(found.double(), exact)


@pytest.mark.parametrize("kind", ["plain", "norm"])
def test_a_bad_token_is_nan_and_no_other(library: ctypes.CDLL, kind: str) -> None:
    values = values_of(kind, 3, 256, torch.bfloat16)
    values.inputs[1, 3] = torch.inf
    found = run_few(
        library, values, weight(16, 256, 32), (1, 6, 1), dtype=torch.bfloat16
    )
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize(
    ("rows", "columns"), [(4096, 4096), (22016, 4096), (4096, 11008), (57344, 8192)]
)
@pytest.mark.parametrize("group", [None, 32, 128])
def test_blocks_fit_their_multiprocessor(
    library: ctypes.CDLL, rows: int, columns: int, tokens: int, group: int | None
) -> None:
    across = columns // 128
    run = 0 if group is None else run_of(group, None)
    cut = few_schedule(tokens, rows // 16, across, run, 132)
    if cut is None:
        assert 16 * columns > 160_000  # bytes that leave no room for a ring
        return
    arguments = FewArguments()
    arguments.tiles, arguments.depth = cut.tiles, cut.depth
    arguments.linear.tokens, arguments.linear.across = tokens, across
    arguments.linear.run = run
    arguments.linear.weight_groups = columns // (group or columns)
    assert library.bytes_of_few(ctypes.byref(arguments)) <= 227 << 10
    assert cut.at_once <= 132


def test_many_tokens_are_not_its_work() -> None:
    assert few_schedule(17, 256, 32, 128, 132) is None
