"""Predicted losses: from gradients, and from measuring one unit at a time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import pytest
import torch
from allocation_fixtures import Searched, searched
from streaming_fixtures import WINDOWS

from compress.allocation.assemble import Assembly, assembled_model
from compress.allocation.sensitivity import (
    fisher_slopes,
    measured_slopes,
    scaled,
    unit_error,
)
from compress.model.streaming import StreamedModel


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    schemes = ("int6-g32", "int8-g32")  # small changes: of second order
    return searched(tmp_path_factory.mktemp("levels"), schemes=schemes)


def errors_of(found: Searched) -> list[list[float]]:
    return [
        [unit_error(option.layers, found.levels) for option in unit.options]
        for unit in found.candidates.units
    ]


def inside(found: Searched) -> list[int]:
    """Return the units in blocks, which have statistics."""
    return [
        i for i, u in enumerate(found.candidates.units) if ".layers." in u.layers[0]
    ]


def test_fisher_predicts_the_measured_kl(found: Searched) -> None:
    """Both on the same tokens; the standard error of a ratio is about 15 %."""
    units = found.candidates.units
    slopes = fisher_slopes(
        StreamedModel(found.model, found.source, device="cpu"),
        WINDOWS,
        units,
        errors_of(found),
        levels=found.levels,
        store=found.store,
        draws=24,
        seed=0,
    )
    model = assembled_model(
        found.model,
        found.source,
        found.store,
        found.levels,
        device="cpu",
        dtype=torch.float32,
    )
    options = [[option.layers for option in unit.options] for unit in units]
    assembly = Assembly(model, WINDOWS, options, found.levels)
    ratios = []
    for i in inside(found):
        alone = [0 if j == i else None for j in range(len(units))]
        predicted = slopes[i] * errors_of(found)[i][0]
        ratios.append(predicted / assembly.measure(alone))
    assert statistics.geometric_mean(ratios) == pytest.approx(1, abs=0.2)
    assert 0.4 < min(ratios) and max(ratios) < 2.5


def test_the_same_seed_gives_the_same_slopes(found: Searched) -> None:
    def slopes(seed: int) -> list[float]:
        return fisher_slopes(
            StreamedModel(found.model, found.source, device="cpu"),
            WINDOWS[:, :8],
            found.candidates.units,
            errors_of(found),
            levels=found.levels,
            store=found.store,
            seed=seed,
        )

    assert slopes(0) == slopes(0) != slopes(1)


def test_measured_slopes_take_the_worst_choice_alone(found: Searched) -> None:
    units = found.candidates.units
    asked: list[list[int | None]] = []

    def measure(assignment: Sequence[int | None]) -> float:
        asked.append(list(assignment))
        return 3.0

    errors = [[0.5, 0.1] if i % 2 else [0.1, 0.2] for i in range(len(units))]
    errors[2] = [0.0, 0.0]
    slopes = measured_slopes(units, errors, measure)
    assert slopes[:3] == [15.0, 6.0, 0.0]
    measured = [i for i in range(len(units)) if i != 2]  # without error no loss
    for i, assignment in zip(measured, asked, strict=True):
        assert assignment[i] == (0 if i % 2 else 1)
        assert [x for j, x in enumerate(assignment) if j != i] == [None] * (
            len(units) - 1
        )


def test_a_units_error_weighs_layers_by_their_energy(found: Searched) -> None:
    layers = [u.options[0].layers[0] for u in found.candidates.units][2:5]
    levels = [found.levels[layer] for layer in layers]
    lost = sum(level.error * level.energy for level in levels)
    total = sum(level.energy for level in levels)
    assert unit_error(layers, found.levels) == pytest.approx(lost / total)
    assert unit_error(layers[:1], found.levels) == pytest.approx(levels[0].error)


def test_losses_are_in_proportion_to_errors() -> None:
    assert scaled(2.0, [0.5, 0.25, 0.0]) == [1.0, 0.5, 0.0]
