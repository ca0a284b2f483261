"""Product quantization: the solver, and the quantizer that calls it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.core import product
from compress.core.codebooks import from_stored
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor
from compress.quantizers.pq import ProductQuantizer

ROWS, COLUMNS = 300, 16


def matrix() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, COLUMNS, generator=generator)


def statistics(counts: Tensor | None = None) -> LayerStatistics:
    """Second moments of inputs whose columns differ in size and move together."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, COLUMNS, generator=generator)
    x = (x + x.roll(1, 1) + x.roll(2, 1)) * torch.logspace(-1, 1, COLUMNS)
    return LayerStatistics(2 * x.T @ x, 500, counts=counts)


def coded(
    name: str,
    found: LayerStatistics | None = None,
    weight: Tensor | None = None,
    **options: object,
) -> QuantizedTensor:
    quantizer = ProductQuantizer(ProductQuantizer.Options.model_validate(options))
    scheme = Scheme.parse(name).with_scales("float32")
    given = (found or statistics()) if quantizer.needs_statistics else None
    return quantizer.quantize(matrix() if weight is None else weight, scheme, given)


def loss(tensor: QuantizedTensor, rows: Tensor | None = None) -> float:
    error = matrix() - tensor.dequantize()
    each = ((error @ statistics().hessian) * error).sum(1)
    return float(each.sum() if rows is None else each[rows].sum())


@pytest.mark.parametrize("sensitivity", ["hessian", "none"])
def test_an_entry_for_each_row_is_exact(sensitivity: str) -> None:
    found = coded("pq-4x9", sensitivity=sensitivity)
    # Entries are means of one row each, moved by feedback of rounding errors only.
    assert torch.allclose(found.dequantize(), matrix(), atol=1e-5)


def test_codes_are_the_nearest_entries() -> None:
    generator = torch.Generator().manual_seed(2)
    points = torch.randn(50, 4, generator=generator)
    entries = torch.randn(16, 4, generator=generator)
    half = torch.randn(4, 4, generator=generator)
    cost = half @ half.T + torch.eye(4)
    found = product.nearest(points, entries, cost)
    for point, code in zip(points, found, strict=True):
        far = [float((point - e) @ cost @ (point - e)) for e in entries]
        assert far[int(code)] == pytest.approx(min(far), rel=1e-5)


def test_without_statistics_every_code_is_the_nearest_entry_of_its_run() -> None:
    found = coded("pq-4x4", sensitivity="none")
    assert found.tables is not None
    codes = from_stored(found.codes)
    for run in range(COLUMNS // 4):
        own = matrix()[:, run * 4 : run * 4 + 4]
        far = torch.cdist(own, found.tables[run, 0]).square()
        chosen = far.gather(1, codes[:, run : run + 1])[:, 0]
        assert torch.allclose(chosen, far.amin(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["pq-4x4", "pq-2x3", "pq-8x4x2", "pq-4x3-scaled"])
def test_inputs_that_count_lose_less(name: str) -> None:
    assert loss(coded(name)) < 0.9 * loss(coded(name, sensitivity="none"))


@pytest.mark.parametrize("name", ["pq-4x4", "pq-8x4x2", "pq-4x3-scaled"])
def test_sweeps_never_raise_the_loss(name: str) -> None:
    # Of H as it is solved with: shrunk and damped as little as can be.
    given = {"shrink": 0, "damp": 1e-9}
    losses = [loss(coded(name, sweeps=n, **given)) for n in (0, 1, 2, 5)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_a_second_table_takes_what_the_first_leaves() -> None:
    assert loss(coded("pq-8x4x2")) < 0.8 * loss(coded("pq-8x4"))


def test_rows_of_frequent_tokens_lose_less() -> None:
    often = torch.arange(ROWS) < 30
    counts = torch.where(often, 1000, 0)
    lost = {
        unseen: loss(coded("pq-4x4", statistics(counts), unseen=unseen), often)
        for unseen in (0.25, 1e9)
    }
    assert lost[0.25] < 0.8 * lost[1e9]


def test_a_power_of_two_scales_the_tables_only() -> None:
    first, second = (coded("pq-4x4", weight=matrix() * size) for size in (1, 8))
    assert first.tables is not None and second.tables is not None
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.tables * 8, second.tables)


def test_values_beyond_float16_are_its_largest() -> None:
    scheme = Scheme.parse("pq-4x4").with_scales("float16")
    found = ProductQuantizer().quantize(matrix() * 1e6, scheme, statistics())
    assert found.tables is not None and found.tables.isfinite().all()


def test_a_hessian_without_a_factor_leaves_a_note() -> None:
    broken = LayerStatistics(torch.full((COLUMNS, COLUMNS), 100.0), 500)
    broken.hessian.fill_diagonal_(1)
    assert any("diagonal only" in note for note in coded("pq-4x4", broken).notes)


def test_the_parts_of_one_matrix_keep_all_tables() -> None:
    found = coded("pq-4x4")
    parts = found.split_rows([100, 200])
    assert torch.equal(
        torch.cat([part.dequantize() for part in parts]), found.dequantize()
    )


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("pq-4x8", (576, 576), "256 entries a table for only 576 runs"),
        ("pq-8x8", (4096, 576), "takes 2.00 bits a weight"),
        ("pq-4x8", (8192, 576), None),
        ("pq-4x8", (49152, 576), None),
    ],
)
def test_tables_that_outweigh_their_codes_are_refused(
    name: str, shape: tuple[int, int], why: str | None
) -> None:
    found = ProductQuantizer().obstacle(Scheme.parse(name), shape)
    if why is None:
        assert found is None
        return
    assert found is not None and why in found and "allow_large_tables" in found
    allowed = ProductQuantizer(ProductQuantizer.Options(allow_large_tables=True))
    assert allowed.obstacle(Scheme.parse(name), shape) is None


def test_only_tables_of_runs_of_columns_are_made() -> None:
    names = ("pq-4x8", "pq-8x8x2-scaled", "palette-4x8", "aqlm-2x8g8", "int4-g64")
    found = [ProductQuantizer().supports(Scheme.parse(name)) for name in names]
    assert found == [True, True, False, False, False]
