"""The kernel for few tokens, run on a CPU; see ``test_w6a8_emulated``."""

from __future__ import annotations

import ctypes

import pytest
import torch
from kernel_fixtures import (
    check,
    codes_of,
    emulated_kernels,
    padded,
    weight,
)
from torch import Tensor

from compress.runtime.w6a8 import reference
from compress.runtime.w6a8.abi import LinearArguments
from compress.runtime.w6a8.arguments import linear_arguments
from compress.runtime.w6a8.schedule import Schedule, few_pays, few_schedule
from compress.runtime.w6a8.tiles import TiledWeight, run_of


@pytest.fixture
def library() -> ctypes.CDLL:
    return emulated_kernels()


def run_few(
    library: ctypes.CDLL,
    given: tuple[Tensor, Tensor],
    weight: TiledWeight,
    cut: tuple[int, int, int],
    *,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    at_once: bool = False,
) -> Tensor:
    (codes, scales), (tiles, depth, blocks) = given, cut
    codes = padded(codes)
    outputs = torch.full((len(codes), weight.shape[0]), 777.0).to(dtype)
    cut = Schedule(
        "few", 8, weight.down // tiles, at_once=blocks, tiles=tiles, depth=depth
    )
    arguments = linear_arguments((codes, scales), weight, outputs, cut, None)
    arguments.bias = None if bias is None else bias.data_ptr()
    library.emulate_few(ctypes.byref(arguments), int(at_once))
    return outputs


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k", "group", "cut"),
    [
        (1, 70, 1408, 128, (4, 6, 2)),
        (3, 128, 1280, 64, (2, 6, 3)),
        (8, 65, 1312, 32, (1, 12, 4)),
        (7, 33, 832, None, (2, 6, 1)),
        (5, 64, 1024, 256, (4, 12, 9)),
        (2, 1, 160, 32, (1, 6, 132)),
        (9, 70, 1408, 128, (4, 3, 2)),
        (16, 65, 832, 32, (1, 6, 4)),
        (13, 40, 1280, 64, (2, 12, 3)),
        (12, 33, 640, None, (2, 3, 1)),
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


def test_integers_are_added_exactly(library: ctypes.CDLL) -> None:
    generator = torch.Generator().manual_seed(0)
    qa = torch.randint(-127, 128, (5, 640), generator=generator).to(torch.int8)
    tiled = weight(48, 640, 128)
    tiled.scales.fill_(1)
    given = qa, torch.ones(5, 1)
    found = run_few(library, given, tiled, (1, 6, 2), dtype=torch.float32)
    exact = qa.double() @ codes_of(tiled)[0].double().t()
    assert torch.equal(found.double(), exact)


def test_a_bad_token_is_nan_and_no_other(library: ctypes.CDLL) -> None:
    x = torch.ones(3, 256)
    x[1, 3] = torch.inf
    given = reference.quantize_activations(x, None)
    found = run_few(
        library, given, weight(16, 256, 32), (1, 6, 1), dtype=torch.bfloat16
    )
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 8, 16])
@pytest.mark.parametrize(
    ("rows", "columns"), [(4096, 4096), (22016, 4096), (4096, 11008), (57344, 8192)]
)
@pytest.mark.parametrize("group", [None, 32, 128])
def test_blocks_fit_their_multiprocessor(
    library: ctypes.CDLL, rows: int, columns: int, tokens: int, group: int | None
) -> None:
    across, shared = columns // 128, 227 << 10
    run = 0 if group is None else run_of(group, None)
    cut = few_schedule(tokens, rows // 16, across, 132, run, shared)
    assert cut is not None
    arguments = LinearArguments(
        tokens=tokens,
        across=across,
        tiles_of_block=cut.tiles,
        depth=cut.depth,
        run=run,
        weight_groups=columns // (group or columns),
    )
    assert library.bytes_of_few(ctypes.byref(arguments)) <= shared


def test_many_tokens_are_not_its_work() -> None:
    assert few_schedule(17, 256, 32, 132, 128, 227 << 10) is None
    assert few_schedule(16, 256, 120, 132, 128, 227 << 10) is None  # too wide


@pytest.mark.parametrize(
    ("tokens", "rows", "run", "pays"),
    [(8, 4096, 0, True), (9, 22016, 128, True), (9, 22016, 0, False)]
    + [(16, 8192, 128, False)],
)
def test_two_sets_are_for_many_rows(
    tokens: int, rows: int, run: int, pays: bool
) -> None:
    assert few_pays(tokens, rows // 16, 132, run) == pays
