"""What every allocator keeps to, on problems whose loss is a sum with a known form."""

from __future__ import annotations

import random

import pytest

from compress import registry
from compress.core.allocation import AllocationProblem, Choice, Traits, Unit
from compress.core.contracts import Allocator
from compress.core.errors import AllocationError
from compress.core.scheme import Scheme

NAMES = ("int2-g32", "int3-g32", "int4-g32", "int5-g32", "int6-g32", "int8-g32")
SMALL: dict[str, dict[str, object]] = {
    "ramp": {"warm_up": 2, "episodes": 4, "hidden": (32, 32), "gradient_steps": 2},
    "reinforce": {"evaluations": 12},
    "evolution": {"evaluations": 30},
    "random": {"evaluations": 30},
}
"""Options of searches, small enough for a test."""
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def additive_problem(
    *, blocks: int = 4, bits: float = 4.0, seed: int = 0, problem_seed: int = 0
) -> AllocationProblem:
    """Units with losses ``a_l 4^-bits``, the sum of which is what is measured."""
    draw = random.Random(seed)
    units = []
    for block in range(blocks):
        for role in ROLES:
            rows, columns = draw.choice([(64, 64), (192, 64), (64, 192)])
            scale = draw.lognormvariate(0.0, 1.0)
            choices = tuple(
                Choice(
                    scheme,
                    int(rows * columns * scheme.bits_per_weight(columns) / 8),
                    4.0**-scheme.bits,
                    scale * 4.0**-scheme.bits,
                )
                for scheme in map(Scheme.parse, NAMES)
            )
            traits = Traits(
                role, block, blocks, columns, rows, scale**0.5, scale, 1.0, 2.0
            )
            name = f"model.layers.{block}.{role}"
            units.append(Unit(name, (name,), rows * columns, choices, traits))
    budget = int(bits * sum(unit.weights for unit in units) / 8)

    def measure(assignment: object, share: float) -> float:
        return problem.predicted_loss(assignment)  # type: ignore[arg-type]

    problem = AllocationProblem(tuple(units), budget, measure, problem_seed)
    return problem


@pytest.fixture(params=registry.names("allocators"))
def allocator(request: pytest.FixtureRequest) -> Allocator:
    plugin = registry.get_allocator(request.param)
    return plugin(plugin.Options.model_validate(SMALL.get(request.param, {})))


@pytest.mark.parametrize("bits", (2.5, 3.25, 4.0, 6.0, 12.0))
def test_an_allocation_keeps_its_budget(allocator: Allocator, bits: float) -> None:
    problem = additive_problem(bits=bits)
    found = allocator.allocate(problem)
    assert problem.fits(found.assignment)
    assert found.evaluations == problem.evaluations


def test_a_budget_for_everything_takes_the_best_of_everything(
    allocator: Allocator,
) -> None:
    problem = additive_problem(bits=12.0)
    best = tuple(len(unit.choices) - 1 for unit in problem.units)
    assert allocator.allocate(problem).assignment == best


def test_the_same_seed_gives_the_same_allocation(allocator: Allocator) -> None:
    first = allocator.allocate(additive_problem(problem_seed=3))
    again = type(allocator)(allocator.options).allocate(
        additive_problem(problem_seed=3)
    )
    assert first.assignment == again.assignment


def test_a_budget_below_the_smallest_choices_is_refused() -> None:
    with pytest.raises(AllocationError, match="raise the budget by"):
        additive_problem(bits=1.0)
