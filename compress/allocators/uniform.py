"""The same number of bits everywhere: the baseline of every search."""

from __future__ import annotations

from compress.core.allocation import Allocation, AllocationProblem
from compress.core.contracts import Allocator


class Uniform(Allocator):
    """The richest level that all units can take within the budget.

    Levels are compared by bits a weight, since units may have different choices. What
    the budget leaves over is spent from the first unit on, on the next level: without
    it a budget between two levels would be wasted, and no comparison at equal bytes be
    fair.
    """

    name = "uniform"
    summary = "the same bits everywhere, the rest of the budget from the first layer on"
    source = "baseline"

    def allocate(self, problem: AllocationProblem) -> Allocation:
        """Return the assignment; measures nothing."""
        densities = sorted(
            {8 * c.bytes / unit.weights for unit in problem.units for c in unit.choices}
        )
        chosen = [0] * len(problem.units)
        for density in densities:
            level = [
                max(
                    (
                        i
                        for i, c in enumerate(unit.choices)
                        if 8 * c.bytes / unit.weights <= density
                    ),
                    default=0,
                )
                for unit in problem.units
            ]
            if problem.fits(level):
                chosen = level
        for index, unit in enumerate(problem.units):
            raised = [*chosen]
            raised[index] += 1
            if raised[index] < len(unit.choices) and problem.fits(raised):
                chosen = raised
        return Allocation(tuple(chosen), problem.predicted_loss(chosen), 0.0)
