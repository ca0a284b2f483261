"""Which layers are coded together, and what is recorded of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.core.families import family_of
from compress.core.plan import LayerPlan
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.core.tensors import join_rows
from compress.distributed.team import Team
from compress.parts import Part, PartWriter, relative_errors, row_sums, stacks
from compress.quantizers.rtn import RoundToNearest
from compress.registry import get_quantizer
from compress.workdir import WorkDir

LINEARS = family_of("llama").linears


def planned(scheme: str, rows: int = 64, **others: str) -> dict[str, LayerPlan]:
    """Return plans by path; keywords give another scheme to a role."""
    return {
        x.path: LayerPlan(
            x.path, (rows, 128), "rtn", Scheme.parse(others.get(x.role, scheme))
        )
        for x in LINEARS
    }


def roles(groups: list[list[LayerPlan]]) -> list[list[str]]:
    return [[layer.name.split(".")[1][0] for layer in group] for group in groups]


def test_layers_with_one_input_method_and_scheme_are_coded_together() -> None:
    assert roles(stacks(LINEARS, planned("int4-g32"))) == [
        ["q", "k", "v"],
        ["o"],
        ["g", "u"],
        ["d"],
    ]


def test_another_scheme_stands_alone() -> None:
    found = stacks(LINEARS, planned("int4-g32", k="int8-g32"))
    assert roles(found)[:2] == [["q", "v"], ["k"]]


@pytest.mark.parametrize(
    ("scheme", "rows", "together"),
    [
        ("int4-g32", 60, True),
        ("nvfp4", 60, True),  # one scale for the matrix, as in the fused layer
        ("fp8-block", 256, True),
        ("fp8-block", 60, False),  # a block of rows would straddle two layers
        ("fp4-g64-lorc8", 64, False),  # a correction is that of one layer
    ],
)
def test_stacks_do_not_mix_what_layers_must_not_share(
    scheme: str, rows: int, together: bool
) -> None:
    assert (len(stacks(LINEARS, planned(scheme, rows))) == 4) == together


def test_time_is_shared_by_rows(tmp_path: Path) -> None:
    layers = [
        LayerPlan(name, (rows, 32), "rtn", Scheme.parse("int4-g32"))
        for name, rows in (("a", 6), ("b", 2))
    ]
    part = Part({"rtn": RoundToNearest()}, [layers])
    weights = [torch.randn(6, 32), torch.randn(2, 32)]
    values = part.add(layers, weights, None)
    assert [tuple(v.shape) for v in values] == [(6, 32), (2, 32)]
    assert part.records["a"].seconds == pytest.approx(3 * part.records["b"].seconds)
    with PartWriter(WorkDir(tmp_path)) as writer:
        writer.save("0000", part)
    stored = WorkDir(tmp_path).read_layer("0000", "b")
    assert torch.equal(stored.dequantize(), values[1])


def test_a_part_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "blocks").write_text("no folder")
    part = Part({}, [])
    with pytest.raises(OSError), PartWriter(WorkDir(tmp_path)) as writer:
        writer.save("0000", part)


@pytest.mark.parametrize("make", [torch.zeros, torch.ones])
def test_errors_are_relative(make: Callable[..., Tensor]) -> None:
    weight = make(2, 3)
    hessian = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    changed = weight.clone()
    changed[0, 1] += 1
    sums = row_sums(weight, changed, LayerStatistics(hessian, 1))
    error, plain = relative_errors(sums, measured=True)
    size = float(weight.sum()) or 1e-30
    weighted = 12.0 if float(weight.sum()) else 1e-30
    assert plain == pytest.approx(1 / size)
    assert error == pytest.approx(2 / weighted)
    sums = row_sums(weight, changed, None)
    assert relative_errors(sums, measured=False) == (None, pytest.approx(1 / size))


@pytest.mark.parametrize("scheme", ["int4-g32", "int3-g64-asym", "q4_0", "q4_k"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_rows_that_may_be_coded_apart_get_the_same_codes(
    method: str, scheme: str
) -> None:
    """What a method says of itself holds: halves of a matrix are the whole one."""
    quantizer, grid = get_quantizer(method)(), Scheme.parse(scheme)
    assert quantizer.codes_rows_apart(grid)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 256, generator=generator)
    inputs = torch.randn(600, 256, generator=generator)
    statistics = LayerStatistics(2 * inputs.T @ inputs, len(inputs))
    whole = quantizer.quantize(weight, grid, statistics)
    halves = [quantizer.quantize(x, grid, statistics) for x in weight.split([20, 28])]
    joined = join_rows(halves).state()
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, joined[name]), name


@pytest.mark.parametrize(
    ("device", "rows", "coders"),
    [("cpu", 64, (0, 1)), ("cuda:0", 2047, (0,)), ("cuda:0", 2048, (0, 1))],
)
def test_a_gpu_gets_rows_that_fill_it_or_the_whole(
    device: str, rows: int, coders: tuple[int, ...]
) -> None:
    layer = LayerPlan("a", (rows, 32), "rtn", Scheme.parse("int4-g32"))
    team = Team(rank=0, size=2)
    part = Part({"rtn": RoundToNearest()}, [[layer]], team=team, device=device)
    assert part.coders([[layer]]) == [coders]


def test_nothing_is_coded_apart_that_shares_a_scale() -> None:
    for scheme in ("nvfp4", "fp8-block", "fp4-g64-lorc8"):
        assert not get_quantizer("gptq")().codes_rows_apart(Scheme.parse(scheme))
