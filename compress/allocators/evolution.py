"""Evolution of one parent by swaps of bytes, after EvoPress.

Each generation makes offspring of the parent. A mutation raises a unit and lowers
others, drawn at random, until the budget holds again; an offspring is one to three of
them. Selection takes several steps: all offspring are measured on a small share of the
text, the best on a larger one, the last few and the parent on all of it.

Source: Sieberling et al., "EvoPress: Towards Optimal Dynamic Model Compression via
Evolutionary Search", 2024, algorithm 1. What differs: units have different sizes, so a
swap may lower more than one unit and bytes left over are filled again; the parent
starts as the greedy allocation on predicted losses instead of a uniform one; shares are
of text measured anew instead of token counts.

Limits: the additive prediction is used for the start only; each generation costs
``offspring`` measurements on a small share, so few generations fit a small budget.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from compress.allocators.choices import Assignment, ChoiceTable
from compress.allocators.measuring import Measurements
from compress.allocators.uniform import Uniform
from compress.core.allocation import Allocation, AllocationProblem
from compress.core.contracts import Allocator, Options

MUTATIONS = 3
PATIENCE = 50
"""Draws of an offspring that was not seen before, until the search ends."""


class EvolutionOptions(Options):
    """Options of ``evolution``."""

    evaluations: float = Field(
        default=200,
        ge=1,
        description="Measurements on the whole text, or their worth in shares of it.",
    )
    offspring: int = Field(default=16, ge=1, description="In each generation.")
    survivors: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(4, 1), description="How many are left after each step but the last."
    )
    shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=(0.0625, 0.25),
        description="Of the text, for each step but the last, which takes all of it.",
    )
    start: Literal["predicted", "uniform"] = Field(
        default="predicted",
        description="First parent: greedy on predicted losses, or uniform.",
    )

    @model_validator(mode="after")
    def _steps_match(self) -> EvolutionOptions:
        if len(self.survivors) != len(self.shares):
            raise ValueError("survivors and shares need one value for each step")
        return self

    @property
    def generation(self) -> float:
        """Evaluations that a generation takes at most."""
        measured = (self.offspring, *self.survivors)
        return float(np.dot(measured, (*self.shares, 1.0)))


class Evolution(Allocator):
    """Mutations that keep the budget, selected on a growing share of the text."""

    name = "evolution"
    summary = "swaps of bytes, selected on growing shares of the text"
    source = "EvoPress, Sieberling et al. 2024, algorithm 1"
    Options: ClassVar[type[Options]] = EvolutionOptions
    options: EvolutionOptions

    def allocate(self, problem: AllocationProblem) -> Allocation:
        """Return the best assignment that was measured on the whole text."""
        draw = np.random.default_rng(problem.seed)
        table = ChoiceTable.of(problem)
        measured = Measurements(problem)
        uniform = self.options.start == "uniform"
        parent = Uniform().allocate(problem).assignment if uniform else table.greedy()
        measured(parent, note="start")
        seen = {parent}
        afford = self.options.evaluations - self.options.generation
        while measured.spent <= afford:
            offspring = self._offspring(parent, table, seen, draw)
            if not offspring:
                break
            best = self._select(offspring, measured)
            if measured(best, note="offspring") < measured(parent):
                parent = best
        return measured.allocation()

    def _offspring(
        self,
        parent: Assignment,
        table: ChoiceTable,
        seen: set[Assignment],
        draw: np.random.Generator,
    ) -> list[Assignment]:
        """Draw children that no generation had before; fewer if hardly any are left."""
        children: list[Assignment] = []
        for _ in range(PATIENCE * self.options.offspring):
            child = mutate(parent, table, draw)
            if child not in seen:
                seen.add(child)
                children.append(child)
            if len(children) == self.options.offspring:
                break
        return children

    def _select(
        self, offspring: list[Assignment], measured: Measurements
    ) -> Assignment:
        """Return the one that is left when all steps but the last are done."""
        left = offspring
        steps = zip(self.options.survivors, self.options.shares, strict=True)
        for survivors, share in steps:
            if len(left) > survivors:
                ranked = sorted(left, key=lambda c: measured(c, share=share))
                left = ranked[:survivors]
        return min(left, key=measured)


def mutate(
    parent: Assignment, table: ChoiceTable, draw: np.random.Generator
) -> Assignment:
    """Return a child: a few units raised, others lowered for it, the rest filled up."""
    chosen = np.array(parent)
    swaps = min(int(n) for n in draw.integers(1, MUTATIONS + 1, size=2))
    touched: set[int] = set()
    for _ in range(swaps):
        above = chosen + 1 < table.counts
        above[list(touched)] = False
        if above.any():
            row = int(draw.choice(np.flatnonzero(above)))
            chosen[row] += 1
            touched.add(row)
        while table.size(chosen) > table.budget:
            below = chosen > 0
            below[list(touched)] = False
            if not below.any():  # all were touched: begin anew from the parent
                return parent
            row = int(draw.choice(np.flatnonzero(below)))
            chosen[row] -= 1
            if chosen[row] == 0:
                touched.add(row)
    return table.fill_randomly(chosen.tolist(), draw)
