"""The exact allocator against enumeration, and greedy between it and uniform."""

from __future__ import annotations

import itertools
import random

import pytest

from compress.allocators.greedy import Greedy
from compress.allocators.ilp import ILP
from compress.allocators.uniform import Uniform
from compress.core.allocation import AllocationProblem, Choice, Traits, Unit
from compress.core.scheme import Scheme

SCHEMES = tuple(map(Scheme.parse, ("int2-g32", "int4-g32", "int5-g32", "int8-g32")))
TRAITS = Traits("q", 0, 1, 64, 64, 0.1, 0.1, 1.0, 1.0)


def arbitrary_problem(seed: int, units: int = 6) -> AllocationProblem:
    """Losses and bytes without order: not convex, some choices dominated."""
    draw = random.Random(seed)
    made = tuple(
        Unit(
            f"l{n}",
            (f"l{n}",),
            4096,
            tuple(
                Choice(s, size, 0.1, draw.random())
                for s, size in zip(
                    SCHEMES, sorted(draw.randint(10, 99) for _ in SCHEMES), strict=True
                )
            ),
            TRAITS,
        )
        for n in range(units)
    )
    least = sum(unit.choices[0].bytes for unit in made)
    most = sum(unit.choices[-1].bytes for unit in made)
    budget = draw.randint(least, most)
    return AllocationProblem(made, budget, lambda assignment, share: 0.0, seed)


def best_loss(problem: AllocationProblem) -> float:
    choices = itertools.product(*(range(len(u.choices)) for u in problem.units))
    return min(problem.predicted_loss(a) for a in choices if problem.fits(a))


@pytest.mark.parametrize("seed", range(25))
def test_ilp_finds_what_enumeration_finds(seed: int) -> None:
    problem = arbitrary_problem(seed)
    found = ILP().allocate(problem)
    assert problem.fits(found.assignment)
    loss = problem.predicted_loss(found.assignment)
    assert loss == pytest.approx(best_loss(problem), rel=1e-12)
    assert found.history[-1].note == "optimum"


def test_losses_are_ordered_ilp_greedy_uniform() -> None:
    for seed in range(10):
        problem = arbitrary_problem(seed)
        losses = [
            problem.predicted_loss(method().allocate(problem).assignment)
            for method in (ILP, Greedy, Uniform)
        ]
        assert losses[0] <= losses[1] + 1e-12
        assert losses[0] <= losses[2] + 1e-12


def test_ilp_says_when_it_proved_nothing() -> None:
    found = [
        ILP(ILP.Options(states=1)).allocate(arbitrary_problem(seed, units=9))
        for seed in range(20)
    ]
    assert any("not proved" in one.history[-1].note for one in found)
