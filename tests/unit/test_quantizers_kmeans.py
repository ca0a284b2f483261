"""Palettes by k-means: objectives that fall, and codes that are the best there are."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.core import palettes, second_moments
from compress.core.codebooks import from_stored
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.core.tables import Tables, nearest
from compress.core.tensors import QuantizedTensor
from compress.parts import Part
from compress.quantizers.kmeans import KMeans, KMeansOptions

ROWS, COLUMNS = 40, 48
NAMES = ("palette3", "palette2-r1", "palette3-tensor", "palette3-scaled")
VECTORS = ("palette-2x5", "palette-4x6-r16", "palette-2x5-scaled")


def make_weight() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.02 * torch.randn(ROWS, COLUMNS, generator=generator)


def make_statistics() -> LayerStatistics:
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(COLUMNS, COLUMNS, generator=generator)
    x = torch.randn(400, COLUMNS, generator=generator) @ mixed
    x *= torch.rand(COLUMNS, generator=generator) ** 2
    return LayerStatistics(2 * x.T @ x, len(x))


def coded(name: str, weight: Tensor | None = None, **options: Any) -> QuantizedTensor:
    method = KMeans(KMeansOptions(**options))
    weight = make_weight() if weight is None else weight
    return method.quantize(weight, Scheme.parse(name), make_statistics())


def loss(tensor: QuantizedTensor) -> float:
    hessian = second_moments.regularized(make_statistics().hessian, 0.1)
    gap = make_weight() - tensor.dequantize()
    return float(((gap @ hessian) * gap).sum())


def setting(vector: int) -> tuple[Tensor, Tables, Tensor, Tensor, Tensor]:
    """Target, tables of runs of 16 rows, H, its factor and the order of columns."""
    generator = torch.Generator().manual_seed(2)
    entries = 0.02 * torch.randn(3, 8, vector, generator=generator)
    if vector == 1:
        entries = entries.sort(dim=1).values
    hessian = second_moments.regularized(make_statistics().hessian, 0.1)
    order = second_moments.column_order(hessian, act_order=True, run=vector)
    factor, notes = second_moments.damp_(hessian, order, 0.01)
    assert factor is not None and not notes
    return make_weight(), Tables(entries, 16), hessian, factor, order


@pytest.mark.parametrize("name", [*NAMES, *VECTORS])
def test_feedback_loses_less_than_the_nearest_entries(name: str) -> None:
    plain, fed = coded(name, feedback=False), coded(name, rounds=0, drift=0)
    book = Scheme.parse(name).codebook
    assert book is not None
    # Runs of four columns leave few others to take over what they lose.
    most = 0.9 if book.vector < 4 else 1.01
    assert loss(fed) < most * loss(plain)


@pytest.mark.parametrize("name", [*NAMES, *VECTORS])
def test_rounds_never_raise_the_loss(name: str) -> None:
    found = [loss(coded(name, rounds=n, damp=1e-6)) for n in (0, 1, 2, 4)]
    assert all(b <= a * (1 + 1e-4) for a, b in zip(found, found[1:], strict=False))
    assert found[-1] < found[0]


@pytest.mark.parametrize("name", [n for n in NAMES if "scaled" not in n])
def test_weights_that_count_lose_less(name: str) -> None:
    """Against the diagonal, which is what k-means by columns minimises."""
    diagonal = make_statistics().hessian.diagonal()
    by_hessian = coded(name, feedback=False)
    evenly = coded(name, feedback=False, sensitivity="none")
    found = [
        float(((make_weight() - x.dequantize()).square() * diagonal).sum())
        for x in (by_hessian, evenly)
    ]
    assert found[0] < found[1]


@pytest.mark.parametrize("name", ["palette3", "palette3-r1", "palette3-scaled"])
def test_codes_without_feedback_are_the_nearest_entries(name: str) -> None:
    found = coded(name, feedback=False)
    assert found.tables is not None
    weight = make_weight() / found.scale.float()
    block = found.scheme.rows_of_scale(ROWS)
    for row in range(ROWS):
        table = found.tables[row // block, 0, :, 0].float()
        gaps = (weight[row][:, None] - table).abs()
        chosen = gaps.gather(1, from_stored(found.codes)[row][:, None])[:, 0]
        assert (chosen <= gaps.amin(1) + 1e-7).all()


def test_a_last_short_run_of_rows_has_a_table_of_its_own() -> None:
    """40 rows are runs of 16, 16 and 8; the last 8 are coded as they are alone."""
    whole = coded("palette3")
    last = coded("palette3", make_weight()[32:])
    assert torch.equal(whole.dequantize()[32:], last.dequantize())


@pytest.mark.parametrize("name", ["palette4-r1", "palette3-tensor"])
def test_few_levels_are_kept_exactly(name: str) -> None:
    levels = torch.tensor([-0.5, -0.25, 0.0, 0.125, 1.0])
    generator = torch.Generator().manual_seed(0)
    weight = levels[torch.randint(5, (8, COLUMNS), generator=generator)]
    assert torch.equal(coded(name, weight).dequantize(), weight)


def test_a_power_of_two_scales_the_tables_only() -> None:
    found, larger = coded("palette3"), coded("palette3", make_weight() * 4)
    assert found.tables is not None and larger.tables is not None
    assert torch.equal(found.codes, larger.codes)
    normal = found.tables.abs() > 2**-12  # below, fp16 has fewer digits
    assert torch.equal((found.tables * 4)[normal], larger.tables[normal])


@pytest.mark.parametrize("name", ["palette3", "palette3-scaled", "palette-2x5"])
def test_values_beyond_float16_are_its_largest(name: str) -> None:
    weight = make_weight()
    weight[0, 0], weight[1, 1] = 1e6, -1e6
    values = coded(name, weight, feedback=False).dequantize()
    assert values.isfinite().all()
    assert float(values[0, 0]) > 3e4 and float(values[1, 1]) < -3e4


def test_an_optimum_is_no_worse() -> None:
    diagonal = make_statistics().hessian.diagonal()
    found = [
        float(
            (make_weight() - coded("palette3", feedback=False, exact=x).dequantize())
            .square()
            .mul(diagonal + 1e-3 * diagonal.mean())
            .sum()
        )
        for x in (True, False)
    ]
    assert found[0] <= found[1] * 1.001  # tables are rounded to fp16 afterwards


@pytest.mark.parametrize("vector", [1, 2, 4])
def test_feedback_makes_later_columns_take_over(vector: int) -> None:
    """Against a slow form: fix a run, then solve all later columns exactly."""
    target, tables, hessian, factor, order = setting(vector)
    codes = palettes.solve(target, tables, factor, order)
    for row in (0, 17, 39):
        table = tables.entries[row // 16].double()
        error = torch.zeros(COLUMNS, dtype=torch.float64)
        done: list[int] = []
        for run in torch.split(order, vector):
            left = [c for c in order.tolist() if c not in done]
            metric = hessian.double()
            free, fixed = metric[left][:, left], metric[left][:, done]
            # What the columns left should be in error, given those that are done.
            wanted = -torch.linalg.solve(free, fixed @ error[done])[:vector]
            rest = [c for c in left if c not in run.tolist()]
            own = metric[run][:, run]
            if rest:
                across = metric[run][:, rest]
                own = own - across @ torch.linalg.solve(metric[rest][:, rest], across.T)
            gaps = target[row, run].double() - table - wanted
            best = ((gaps @ own) * gaps).sum(1).argmin()
            assert int(codes[row, int(run[0]) // vector]) == int(best)
            error[run] = target[row, run].double() - table[best]
            done += run.tolist()


@pytest.mark.parametrize("vector", [1, 2, 4])
def test_descent_never_raises_the_loss_of_a_row(vector: int) -> None:
    target, tables, hessian, _, order = setting(vector)
    codes = nearest(target, tables, hessian.diagonal())
    before = palettes.losses(target, tables, codes, hessian)
    codes = palettes.descend(target, tables, codes, hessian, order)
    after = palettes.losses(target, tables, codes, hessian)
    assert (after <= before * (1 + 1e-5)).all() and (after < before).any()


@pytest.mark.parametrize("vector", [1, 2])
def test_refitting_finds_the_least_squares_tables(vector: int) -> None:
    """Against the normal equations of one table, made with dense matrices."""
    target, tables, hessian, _, _ = setting(vector)
    target, tables = target[:16], replace(tables, entries=tables.entries[:1])
    codes = nearest(target, tables, hessian.diagonal())
    weights = torch.rand(16, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    size = 8 * vector
    normal, right = torch.zeros(size, size).double(), torch.zeros(size).double()
    for row in range(16):
        places = codes[row].repeat_interleave(vector) * vector
        places = places + torch.arange(COLUMNS) % vector
        design = torch.nn.functional.one_hot(places, size).double()
        bent = weights[row].double() * hessian.double() @ design
        normal += design.T @ bent
        right += bent.T @ target[row].double()
    best = torch.linalg.lstsq(normal, right).solution.view(1, 8, vector)
    found = tables
    for _ in range(4):
        found = replace(
            found, entries=palettes.refit(target, found, codes, hessian, weights)
        )
    least, reached, first = (
        float(palettes.losses(target, x, codes, hessian, weights).sum())
        for x in (replace(tables, entries=best.float()), found, tables)
    )
    assert reached - least <= 1e-3 * (first - least)


def test_an_expert_with_few_tokens_gets_plain_k_means() -> None:
    from compress.core.plan import LayerPlan

    scheme = Scheme.parse("palette3")
    layer = LayerPlan("expert", (ROWS, COLUMNS), "kmeans", scheme)
    part = Part({"kmeans": KMeans()}, [[layer]])
    part.add([layer], [make_weight()], make_statistics(), "few tokens")
    found = part.tensors["expert"]
    plain = KMeans(KMeansOptions(feedback=False, sensitivity="none")).quantize(
        make_weight(), scheme, None
    )
    assert found.notes == ("few tokens",)
    assert torch.equal(found.dequantize(), plain.dequantize())
