"""KL of models that are put together from levels, against transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from allocation_fixtures import Searched, logits_with, searched
from streaming_fixtures import WINDOWS

from compress.allocation.assemble import Assembly, LevelSource, assembled_model
from compress.core.plan import LayerPlan
from compress.model.resident import ResidentModel
from compress.model.streaming import StreamedModel

Assignment = Sequence[int | None]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    return searched(tmp_path_factory.mktemp("levels"))


def options_of(found: Searched) -> list[list[tuple[LayerPlan, ...]]]:
    return [[o.layers for o in unit.options] for unit in found.candidates.units]


def assembly_of(found: Searched, *, resident: bool = True) -> Assembly:
    if resident:
        model = assembled_model(
            found.model,
            found.source,
            found.store,
            found.levels,
            device="cpu",
            dtype=torch.float32,
        )
        assert isinstance(model, ResidentModel)
    else:
        levels = LevelSource(found.source, found.store, held_bytes=0, device="cpu")
        model = StreamedModel(found.model, levels, device="cpu")
    return Assembly(model, WINDOWS, options_of(found), found.levels)


def expected_kl(found: Searched, assignment: Assignment, windows: int = 3) -> float:
    """Mean KL over all predicted tokens, in float64 by transformers."""
    none: Assignment = [None] * len(assignment)
    p, q = (
        torch.log_softmax(logits_with(found, a)[:windows, :-1].double(), -1)
        for a in (none, assignment)
    )
    return float((p.exp() * (p - q)).sum(-1).mean())


def assignments(found: Searched) -> list[Assignment]:
    units = found.candidates.units
    last = [None] * (len(units) - 1)
    return [
        [0] * len(units),
        [i % 3 for i in range(len(units))],
        [*last, 0],
        [0, *last],
        [len(unit.options) - 1 for unit in units],
    ]


@pytest.mark.parametrize("resident", [True, False])
def test_kl_is_that_of_the_model_with_the_levels_values(
    found: Searched, resident: bool
) -> None:
    assembly = assembly_of(found, resident=resident)
    for assignment in assignments(found):
        expected = expected_kl(found, assignment)
        assert assembly.measure(assignment) == pytest.approx(expected, rel=2e-3)


def test_the_dense_model_is_at_no_distance(found: Searched) -> None:
    assembly = assembly_of(found)
    assert assembly.measure([0] * len(found.candidates.units)) > 1e-4
    assert assembly.measure([None] * len(found.candidates.units)) < 1e-7


def test_what_was_measured_before_does_not_matter(found: Searched) -> None:
    """Each starts at the first block that differs from the last one."""
    several = assembly_of(found)
    wanted = assignments(found)
    first = [several.measure(assignment) for assignment in wanted]
    again = [several.measure(assignment) for assignment in reversed(wanted)]
    assert again[::-1] == pytest.approx(first, rel=1e-6)


def test_a_share_is_the_first_windows(found: Searched) -> None:
    assembly = assembly_of(found)
    worst: Assignment = [0] * len(found.candidates.units)
    for share, windows in ((1 / 3, 1), (2 / 3, 2), (0.01, 1), (1.0, 3)):
        expected = expected_kl(found, worst, windows)
        assert assembly.measure(worst, share) == pytest.approx(expected, rel=2e-3)


def test_pinned_layers_are_in_every_measurement(found: Searched) -> None:
    assembly = assembly_of(found)
    units = found.candidates.units
    none: list[int | None] = [None] * len(units)
    assembly.pin(units[-1].options[0].layers)
    pinned = assembly.measure(none)
    assert pinned == pytest.approx(expected_kl(found, [*none[:-1], 0]), rel=2e-3)


def test_codes_beyond_the_room_are_read_from_disk(
    found: Searched, tmp_path: Path
) -> None:
    level = found.levels[found.wanted[0]]
    held = LevelSource(found.source, found.store, held_bytes=1 << 20, device="cpu")
    unheld = LevelSource(found.source, found.store, held_bytes=10, device="cpu")
    assert torch.equal(held.values(level), unheld.values(level))
    assert held._held and not unheld._held
