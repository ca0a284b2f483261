"""The exact optimum of the additive model: a multiple-choice knapsack.

Minimise the sum of the choices' losses, one choice for each unit, bytes within the
budget. The relaxation in which choices may be mixed is solved by taking steps along
each unit's lower convex hull in order of loss saved a byte; its multiplier ``m`` prices
a byte. A choice costs ``r = loss + m * bytes`` more than its unit's cheapest, and any
assignment whose ``r`` sum to more than the gap between the relaxation and a known
assignment cannot be better than that one: this rules most choices out. What is left is
searched by dynamic programming over Pareto states (bytes, loss), pruned by the same
bound, so the result is optimal.

Source: Pisinger (1995), "A minimal algorithm for the multiple-choice knapsack problem";
dominance of states from Nemhauser and Ullmann (1969). Limits: the loss is a sum. The
number of states has no polynomial bound; layers of transformers have few different
sizes, so that sums coincide: 211 units of 6 choices take a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from compress.core.allocation import Allocation, AllocationProblem, Step
from compress.core.contracts import Allocator, Options

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
# Losses are sums of some hundred floats; a bound that is closer than this is equal.
_TOLERANCE = 1e-12


class ILPOptions(Options):
    """Options of ``ilp``.

    Attributes:
        states: States that the search may hold. Beyond them the most promising are
            kept, and the history says that the result is not proved to be the optimum.
    """

    states: int = Field(default=2_000_000, ge=1)


class ILP(Allocator):
    """The optimum of predicted losses."""

    name = "ilp"
    summary = "exact optimum of the predicted losses (multiple-choice knapsack)"
    source = "Pisinger 1995; HAWQ-V3 (arXiv 2011.10680) for the use"
    Options: ClassVar[type[Options]] = ILPOptions
    options: ILPOptions

    def allocate(self, problem: AllocationProblem) -> Allocation:
        """Return the assignment; measures nothing."""
        units = [
            _Unit.of([(c.bytes, c.loss) for c in unit.choices])
            for unit in problem.units
        ]
        price, start = _relaxed(units, problem.budget)
        found, is_proved = _search(units, problem.budget, price, start, self.options)
        assignment = tuple(
            int(unit.index[i]) for unit, i in zip(units, found, strict=True)
        )
        loss = problem.predicted_loss(assignment)
        note = "optimum" if is_proved else "best of the states kept, not proved"
        history = (Step(0.0, _loss(units, start), "rounded relaxation"),)
        return Allocation(assignment, loss, 0.0, (*history, Step(0.0, loss, note)))


@dataclass(frozen=True)
class _Unit:
    """A unit's choices of which none is both larger and worse than another.

    Attributes:
        index: Into the unit's choices.
        bytes: Rising.
        loss: Falling.
    """

    index: Integers
    bytes: Integers
    loss: Floats

    @classmethod
    def of(cls, choices: Sequence[tuple[int, float]]) -> _Unit:
        order = sorted(range(len(choices)), key=choices.__getitem__)
        kept: list[int] = []
        for i in order:
            if not kept or choices[i][1] < choices[kept[-1]][1]:
                kept.append(i)
        return cls(
            np.array(kept, np.int64),
            np.array([choices[i][0] for i in kept], np.int64),
            np.array([choices[i][1] for i in kept], np.float64),
        )

    def hull(self) -> list[int]:
        """Return the choices on the lower convex hull of loss over bytes."""
        found = [0]
        for i in range(1, len(self.bytes)):
            while len(found) > 1 and self._saving(found[-2], i) >= self._saving(
                found[-2], found[-1]
            ):
                found.pop()
            found.append(i)
        return found

    def _saving(self, i: int, j: int) -> float:
        return float((self.loss[i] - self.loss[j]) / (self.bytes[j] - self.bytes[i]))

    def steps(self) -> list[tuple[float, int, int]]:
        """Return loss saved a byte, and the choices, of each step along the hull."""
        hull = self.hull()
        return [(self._saving(i, j), i, j) for i, j in zip(hull, hull[1:])]  # noqa: B905


def _loss(units: Sequence[_Unit], chosen: Sequence[int]) -> float:
    return sum(float(u.loss[i]) for u, i in zip(units, chosen, strict=True))


def _relaxed(units: Sequence[_Unit], budget: int) -> tuple[float, list[int]]:
    """Return the price of a byte in the relaxation, and a good assignment."""
    chosen = [0] * len(units)
    room = budget - sum(int(unit.bytes[0]) for unit in units)
    steps = sorted(
        ((s, n, i, j) for n, unit in enumerate(units) for s, i, j in unit.steps()),
        key=lambda step: (-step[0], step[1]),
    )
    price = 0.0
    for saving, n, i, j in steps:
        size = int(units[n].bytes[j] - units[n].bytes[i])
        if size > room and not price:
            price = saving
        if chosen[n] == i and size <= room:
            chosen[n], room = j, room - size
    return price, chosen


def _search(
    units: Sequence[_Unit],
    budget: int,
    price: float,
    start: list[int],
    options: ILPOptions,
) -> tuple[list[int], bool]:
    """Return the best assignment, and whether it is proved to be the best."""
    costs = [unit.loss + price * unit.bytes for unit in units]
    bound = sum(float(cost.min()) for cost in costs) - price * budget
    best = _loss(units, start)
    gap = best - bound + _TOLERANCE * max(1.0, abs(best))
    extra = [cost - cost.min() for cost in costs]
    allowed = [np.flatnonzero(e <= gap) for e in extra]
    # Units with one choice left come first: they make no states.
    order = sorted(range(len(units)), key=lambda n: (len(allowed[n]), n))
    least = np.array([int(units[n].bytes[allowed[n]].min()) for n in order])
    later = np.concatenate([np.cumsum(least[::-1])[::-1][1:], [0]])
    states = _States.empty()
    stages: list[_States] = []
    is_proved = True
    for n, rest in zip(order, later, strict=True):
        unit, choices = units[n], allowed[n]
        states = states.with_unit(unit, choices, extra[n], gap, budget - int(rest))
        if len(states.bytes) > options.states:
            states, is_proved = states.best(options.states), False
        stages.append(states)
        if not len(states.bytes):
            return start, is_proved  # nothing beats what is known
    final = int(states.loss.argmin())
    if float(states.loss[final]) >= best:
        return start, is_proved
    found = list(start)
    for n, stage in zip(reversed(order), reversed(stages), strict=True):
        found[n] = int(stage.choice[final])
        final = int(stage.parent[final])
    return found, is_proved


@dataclass(frozen=True)
class _States:
    """Assignments of the units so far, by bytes; no one is larger and worse."""

    bytes: Integers
    loss: Floats
    extra: Floats
    parent: Integers
    choice: Integers

    @classmethod
    def empty(cls) -> _States:
        none = np.zeros(1, np.int64)
        return cls(none, np.zeros(1), np.zeros(1), none, none)

    def with_unit(
        self, unit: _Unit, choices: Integers, extra: Floats, gap: float, room: int
    ) -> _States:
        """Return the states with one more unit."""
        count = len(self.bytes)
        size = (self.bytes[:, None] + unit.bytes[choices]).ravel()
        loss = (self.loss[:, None] + unit.loss[choices]).ravel()
        above = (self.extra[:, None] + extra[choices]).ravel()
        parent = np.repeat(np.arange(count), len(choices))
        choice = np.tile(choices, count)
        kept = np.flatnonzero((size <= room) & (above <= gap))
        kept = kept[np.lexsort((loss[kept], size[kept]))]
        if len(kept):
            lowest = np.minimum.accumulate(loss[kept])
            better = np.concatenate([[True], loss[kept][1:] < lowest[:-1]])
            kept = kept[better]
        return _States(size[kept], loss[kept], above[kept], parent[kept], choice[kept])

    def best(self, count: int) -> _States:
        """Return the states with the lowest bounds."""
        kept = np.sort(np.argpartition(self.extra, count)[:count])
        return _States(
            self.bytes[kept],
            self.loss[kept],
            self.extra[kept],
            self.parent[kept],
            self.choice[kept],
        )
