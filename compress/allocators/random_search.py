"""The best of many random assignments: what any search must beat.

An assignment is drawn by raising units picked at random, a choice at a time, until no
raise fits the budget any more, so that each candidate spends all of it.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from compress.allocators.choices import ChoiceTable
from compress.allocators.measuring import Measurements
from compress.core.allocation import Allocation, AllocationProblem
from compress.core.contracts import Allocator, Options


class RandomOptions(Options):
    """Options of ``random``."""

    evaluations: int = Field(
        default=200, ge=1, description="Assignments to draw and measure."
    )


class RandomSearch(Allocator):
    """The best of many random assignments that spend the budget."""

    name = "random"
    summary = "the best of many random assignments"
    source = "baseline"
    Options: ClassVar[type[Options]] = RandomOptions
    options: RandomOptions

    def allocate(self, problem: AllocationProblem) -> Allocation:
        """Return the best; measures each distinct assignment once."""
        draw = np.random.default_rng(problem.seed)
        table = ChoiceTable.of(problem)
        measured = Measurements(problem)
        for _ in range(self.options.evaluations):
            measured(table.fill_randomly([0] * len(table.counts), draw), note="draw")
        return measured.allocation()
