"""AQLM: its arithmetic against slow loops and closed forms, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch

from compress.core import second_moments
from compress.core.additive import fit, kmeans, search, solve
from compress.core.additive.sums import decoded, gathered, row_losses
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.quantizers.aqlm import AQLM, AQLMOptions

ROWS, COLUMNS, VECTOR, ENTRIES, COUNT = 24, 32, 4, 8, 2
GROUPS = COLUMNS // VECTOR


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_weight(seed: int = 1) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=random(seed))


def make_hessian(seed: int = 2) -> torch.Tensor:
    mixed = torch.randn(COLUMNS, COLUMNS, generator=random(seed))
    inputs = torch.randn(200, COLUMNS, generator=random(seed + 1)) @ mixed
    hessian = inputs.T @ inputs
    return hessian / hessian.diagonal().mean()


def make_tables(seed: int = 4) -> torch.Tensor:
    return torch.randn(COUNT, ENTRIES, VECTOR, generator=random(seed))


def make_codes(seed: int = 5) -> torch.Tensor:
    return torch.randint(ENTRIES, (ROWS, GROUPS, COUNT), generator=random(seed))


def factored(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    runs = solve.run_order(hessian, VECTOR)
    damped = hessian.clone()
    order = solve.columns_of(runs, VECTOR)
    factor, _ = second_moments.damp_(damped, order, 0.01)
    assert factor is not None
    return damped, runs, factor


def quantized(
    weight: torch.Tensor, name: str, dtype: str = "float32", **options: float
) -> tuple[torch.Tensor, float]:
    """Return codes, and the loss in the metric of the statistics."""
    hessian = make_hessian()
    scheme = Scheme.parse(name).with_scales(dtype)
    method = AQLM(AQLMOptions.model_validate(options))
    coded = method.quantize(weight, scheme, LayerStatistics(hessian, 200))
    gap = weight - coded.dequantize()
    return coded.codes, float(row_losses(gap, hessian).sum())


# Sums


def test_decoding_adds_one_entry_of_each_table() -> None:
    codes, tables = make_codes(), make_tables()
    expected = torch.empty(ROWS, COLUMNS)
    for row, group in itertools.product(range(ROWS), range(GROUPS)):
        places = codes[row, group].tolist()
        total = sum(tables[m, place] for m, place in enumerate(places))
        expected[row, group * VECTOR : (group + 1) * VECTOR] = total
    assert torch.equal(decoded(codes, tables), expected)


def test_gathering_is_the_gradient_of_decoding() -> None:
    codes, values = make_codes(), make_weight()
    tables = make_tables().requires_grad_()
    decoded(codes, tables).backward(values)
    assert tables.grad is not None
    torch.testing.assert_close(gathered(values, codes, ENTRIES), tables.grad)


# k-means


def test_inertia_never_rises_though_clusters_are_empty() -> None:
    points = torch.randn(400, VECTOR, generator=random())
    weights = torch.rand(400, generator=random(1))
    centres = points[:12].clone()
    centres[6:] = 50  # nothing is near
    inertias = []
    for _ in range(12):
        centres, inertia = kmeans.step(points, weights, centres)
        inertias.append(float(inertia))
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(inertias))
    assert len(kmeans.nearest(points, centres).unique()) == 12


def test_a_centre_is_the_weighted_mean_of_its_points() -> None:
    points = torch.randn(50, VECTOR, generator=random())
    weights = torch.rand(50, generator=random(1))
    centres, _ = kmeans.step(points, weights, points[:1].clone())
    expected = (points * weights.unsqueeze(1)).sum(0) / weights.sum()
    torch.testing.assert_close(centres[0], expected)


def test_nearest_is_that_of_all_distances() -> None:
    points = torch.randn(100, VECTOR, generator=random())
    centres = torch.randn(9, VECTOR, generator=random(1))
    expected = torch.cdist(points, centres).argmin(1)
    assert torch.equal(kmeans.nearest(points, centres), expected)


def test_a_second_table_lowers_the_error() -> None:
    points = torch.randn(500, VECTOR, generator=random())
    errors = []
    for count in (1, 2):
        tables, codes = kmeans.residual_tables(
            points,
            torch.ones(500),
            count=count,
            entries=16,
            points_per_entry=64,
            iterations=10,
            generator=random(),
        )
        values = decoded(codes.unsqueeze(1), tables)
        errors.append(float((points - values).square().sum()))
    assert errors[1] < errors[0]


# Codes


@pytest.mark.parametrize("beam", [1, 4])
def test_descent_never_raises_the_loss_of_a_row(beam: int) -> None:
    weight, hessian, tables, codes = (
        make_weight(),
        make_hessian(),
        make_tables(),
        make_codes(),
    )
    losses = [row_losses(weight - decoded(codes, tables), hessian)]
    for _ in range(4):
        codes = search.descend(
            weight, hessian, tables, codes, beam=beam, generator=random()
        )
        losses.append(row_losses(weight - decoded(codes, tables), hessian))
    for before, after in itertools.pairwise(losses):
        assert (after <= before + 1e-5 * losses[0]).all()
    assert losses[-1].sum() < losses[0].sum()


def test_descent_ends_where_no_single_code_helps() -> None:
    weight, hessian, tables = make_weight(), make_hessian(), make_tables()
    codes = make_codes()
    for _ in range(60):
        codes = search.descend(
            weight, hessian, tables, codes, beam=1, generator=random()
        )
    least = row_losses(weight - decoded(codes, tables), hessian)
    for group, m in itertools.product(range(GROUPS), range(COUNT)):
        for code in range(ENTRIES):
            other = codes.clone()
            other[:, group, m] = code
            loss = row_losses(weight - decoded(other, tables), hessian)
            assert (loss >= least - 1e-4 * least.mean()).all()


def test_a_wide_beam_finds_the_best_codes_of_one_run() -> None:
    """With as many candidates as there are pairs of codes the search is exhaustive."""
    hessian = make_hessian()[:VECTOR, :VECTOR]
    weight, tables = make_weight()[:, :VECTOR], make_tables()
    codes = search.descend(
        weight,
        hessian,
        tables,
        make_codes()[:, :1],
        beam=ENTRIES**2,
        generator=random(),
    )
    found = row_losses(weight - decoded(codes, tables), hessian)
    pairs = itertools.product(range(ENTRIES), repeat=COUNT)
    every = torch.stack(
        [row_losses(weight - (tables[0, a] + tables[1, b]), hessian) for a, b in pairs]
    )
    torch.testing.assert_close(found, every.amin(0))


def test_a_beam_is_better_than_none_on_average() -> None:
    hessian = make_hessian()
    totals = {1: 0.0, 4: 0.0}
    for seed in range(5):
        weight, tables = make_weight(seed), make_tables(seed + 20)
        for beam in totals:
            codes = search.descend(
                weight, hessian, tables, make_codes(), beam=beam, generator=random()
            )
            lost = row_losses(weight - decoded(codes, tables), hessian)
            totals[beam] += float(lost.sum())
    assert totals[4] < totals[1]


def test_feedback_equals_a_slow_loop_of_least_squares() -> None:
    """Runs are taken in order; after each, the rest takes its best values."""
    weight, tables = make_weight()[:2], make_tables()
    hessian, runs, factor = factored(make_hessian())
    codes = search.feedback(weight, factor, runs, tables, beam=ENTRIES**2)
    pairs = list(itertools.product(range(ENTRIES), repeat=COUNT))
    for row in range(2):
        left, free = weight[row].double().clone(), list(range(COLUMNS))
        exact = hessian.double()
        for run in runs.tolist():
            own = list(range(run * VECTOR, (run + 1) * VECTOR))
            free = [c for c in free if c not in own]
            inside, across = exact[own][:, own], exact[own][:, free]
            rest = torch.linalg.inv(exact[free][:, free]) if free else None
            if rest is not None:
                inside = inside - across @ rest @ across.T
            gaps = [left[own] - (tables[0, a] + tables[1, b]) for a, b in pairs]
            costs = torch.stack([gap @ inside @ gap for gap in gaps])
            best = int(costs.argmin())
            assert tuple(codes[row, run].tolist()) == pairs[best]
            if rest is not None:
                left[free] += gaps[best] @ across @ rest


# Tables and scales


def test_tables_are_those_of_least_squares() -> None:
    """The gradient of the objective vanishes at enough steps."""
    weight, hessian, codes = make_weight(), make_hessian(), make_codes()
    scales = 0.5 + torch.rand(ROWS, generator=random(7))
    target, weights = weight / scales.unsqueeze(1), scales.square()
    tables = fit.fitted_tables(
        target, weights, hessian, codes, make_tables(), iterations=400
    ).requires_grad_()
    lost = (weights * row_losses(target - decoded(codes, tables), hessian)).sum()
    lost.backward()
    start = make_tables().requires_grad_()
    (weights * row_losses(target - decoded(codes, start), hessian)).sum().backward()
    assert tables.grad is not None and start.grad is not None
    assert float(tables.grad.norm()) < 1e-3 * float(start.grad.norm())


def test_a_few_steps_lower_the_loss_and_leave_unused_entries() -> None:
    weight, hessian, codes = make_weight(), make_hessian(), make_codes()
    codes[codes == 3] = 2
    before, ones = make_tables(), torch.ones(ROWS)
    after = fit.fitted_tables(weight, ones, hessian, codes, before, iterations=3)
    losses = [
        float(row_losses(weight - decoded(codes, x), hessian).sum())
        for x in (before, after)
    ]
    assert losses[1] < losses[0]
    assert torch.equal(after[:, 3], before[:, 3])


def test_scales_are_the_closed_form_and_stay_positive() -> None:
    weight, hessian = make_weight(), make_hessian()
    values = weight * 0.25
    values[1] *= -1
    scales = fit.fitted_scales(weight, hessian, values, torch.ones(ROWS))
    expected = torch.full((ROWS,), 4.0)
    expected[1] = 1
    torch.testing.assert_close(scales, expected)


def test_folding_keeps_values_and_makes_the_largest_entry_one() -> None:
    tables, scales = fit.folded(make_tables() * 1e-4, torch.rand(ROWS) * 1e5)
    assert float(tables.abs().max()) == 1
    again, same = fit.folded(tables, scales)
    assert torch.equal(again, tables) and torch.equal(same, scales)


# The plug-in


def test_a_representable_matrix_is_recovered() -> None:
    """Eight vectors of length 1 and no more, under scales of their own."""
    vectors = torch.randn(8, VECTOR, generator=random())
    vectors /= vectors.norm(dim=1, keepdim=True)
    codes = torch.randint(8, (ROWS, GROUPS), generator=random(1))
    scales = 0.1 + torch.rand(ROWS, 1, generator=random(2))
    weight = vectors[codes].flatten(1) * scales
    _, lost = quantized(weight, "aqlm-1x3g4")
    assert lost < 1e-6 * float(row_losses(weight, make_hessian()).sum())


def test_scaled_rows_have_the_same_codes() -> None:
    """Powers of two change no rounding; all rows by one, so that none weighs more."""
    codes, lost = quantized(make_weight(), "aqlm-2x3g4")
    other, less = quantized(make_weight() / 4, "aqlm-2x3g4")
    assert torch.equal(codes, other)
    assert less == pytest.approx(lost / 16, rel=1e-4)


@pytest.mark.parametrize("one, two", [("aqlm-1x3g4", "aqlm-2x3g4")])
def test_more_tables_lose_less(one: str, two: str) -> None:
    assert quantized(make_weight(), two)[1] < quantized(make_weight(), one)[1]


def test_rounds_lose_less_than_their_start() -> None:
    weight, hessian = make_weight(), make_hessian()
    damped, _, _ = factored(hessian)
    first = solve.first_sums(weight, damped, shape=(COUNT, ENTRIES, VECTOR), seed=0)
    start = float(row_losses(weight - first.values(), hessian).sum())
    assert quantized(weight, "aqlm-2x3g4")[1] < start / 1.5


def test_another_seed_gives_other_codes() -> None:
    codes, _ = quantized(make_weight(), "aqlm-2x3g4")
    other, _ = quantized(make_weight(), "aqlm-2x3g4", seed=1)
    assert not torch.equal(codes, other)


def test_a_singular_hessian_is_damped_and_a_bad_one_noted() -> None:
    scheme = Scheme.parse("aqlm-1x3g4")
    flat = torch.ones(COLUMNS, COLUMNS)
    coded = AQLM().quantize(make_weight(), scheme, LayerStatistics(flat, 1))
    assert coded.dequantize().isfinite().all()
    bad = torch.eye(COLUMNS)
    bad[0, 1] = bad[1, 0] = 1e6
    coded = AQLM().quantize(make_weight(), scheme, LayerStatistics(bad, 1))
    assert any("diagonal only" in note for note in coded.notes)
    assert coded.dequantize().isfinite().all()


# What it refuses


@pytest.mark.parametrize(
    "name, shape, reason",
    [
        ("aqlm-1x10g8", (192, 576), "1024 entries a table for only 13824 runs"),
        ("aqlm-1x16g8", (4096, 4096), None),
        ("aqlm-1x16g8", (1024, 4096), "65536 entries"),
        ("aqlm-1x12g8", (576, 1152), "bits a weight"),
        ("aqlm-2x8g8", (192, 576), None),
        ("aqlm-1x8g8", (192, 576), None),
    ],
)
def test_tables_that_are_too_large_are_refused(
    name: str, shape: tuple[int, int], reason: str | None
) -> None:
    scheme = Scheme.parse(name)
    assert AQLM().supports(scheme)
    found = AQLM().obstacle(scheme, shape)
    if reason is None:
        assert found is None
        return
    assert found is not None and reason in found and "aqlm-1x8g8" in found
    allowed = AQLM(AQLMOptions(allow_large_tables=True))
    assert allowed.obstacle(scheme, shape) is None


@pytest.mark.parametrize("name", ["int4-g32", "palette4", "palette-4x8"])
def test_other_schemes_are_not_supported(name: str) -> None:
    assert not AQLM().supports(Scheme.parse(name))
