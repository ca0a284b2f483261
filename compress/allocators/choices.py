"""Bytes and losses of all choices as arrays; assignments made to keep a budget.

Repair lowers the unit that loses least for each byte it saves until the budget holds;
filling raises the unit that wins most for each byte until nothing more fits. Repairing
"everything at its best" is the greedy allocation on the losses of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from compress.core.allocation import AllocationProblem

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Assignment = tuple[int, ...]


@dataclass(frozen=True)
class ChoiceTable:
    """What each choice of each unit takes and loses.

    Units may have different numbers of choices; rows are padded to the longest.

    Attributes:
        counts: int64 ``[N]``, choices of each unit.
        bytes: int64 ``[N, K]``; the last choice's where a row is padded.
        losses: float64 ``[N, K]`` nats a token; infinite where a row is padded.
        budget: Bytes of all units together.
    """

    counts: Integers
    bytes: Integers
    losses: Floats
    budget: int

    @classmethod
    def of(cls, problem: AllocationProblem) -> ChoiceTable:
        """Return the table of a problem, with its predicted losses."""
        counts = np.array([len(unit.choices) for unit in problem.units])
        shape = (len(counts), int(counts.max()))
        sizes, losses = np.zeros(shape, np.int64), np.full(shape, np.inf)
        for row, unit in enumerate(problem.units):
            sizes[row] = unit.choices[-1].bytes
            sizes[row, : len(unit.choices)] = [c.bytes for c in unit.choices]
            losses[row, : len(unit.choices)] = [c.loss for c in unit.choices]
        return cls(counts, sizes, losses, problem.budget)

    def with_losses(self, losses: Floats) -> ChoiceTable:
        """Return the same choices with other losses ``[N, K]``."""
        return replace(self, losses=losses)

    @cached_property
    def best(self) -> Assignment:
        """The last choice of each unit, whatever it takes."""
        return tuple(int(count) - 1 for count in self.counts)

    @cached_property
    def _falls(self) -> tuple[Floats, Integers]:
        """Least loss for a byte saved, from each choice ``[N, K]``, and where to."""
        rates = np.full(self.bytes.shape, np.inf)
        targets = np.zeros(self.bytes.shape, np.int64)
        for high in range(1, self.bytes.shape[1]):
            for low in range(high):
                saved = self.bytes[:, high] - self.bytes[:, low]
                valid = (saved > 0) & (high < self.counts)
                rate = np.full(len(saved), np.inf)
                lost = self.losses[valid, low] - self.losses[valid, high]
                rate[valid] = lost / saved[valid]
                better = rate < rates[:, high]
                rates[better, high] = rate[better]
                targets[better, high] = low
        return rates, targets

    def size(self, assignment: Sequence[int] | Integers) -> int:
        """Return the bytes of an assignment."""
        return int(self.bytes[np.arange(len(self.counts)), assignment].sum())

    def loss(self, assignment: Sequence[int] | Integers) -> float:
        """Return the sum of losses of an assignment."""
        return float(self.losses[np.arange(len(self.counts)), assignment].sum())

    def lower(self, assignment: Sequence[int]) -> tuple[Assignment, float]:
        """Lower the least harmful units until the budget holds.

        Returns:
            The assignment, and the loss for a byte of the last step: what a byte is
            worth. It is zero if nothing had to be lowered.
        """
        rates, targets = self._falls
        rows = np.arange(len(self.counts))
        chosen = np.array(assignment, np.int64)
        over, price = self.size(chosen) - self.budget, 0.0
        now = rates[rows, chosen]
        while over > 0:
            row = int(now.argmin())
            price = max(price, float(now[row]))
            target = targets[row, chosen[row]]
            over -= int(self.bytes[row, chosen[row]] - self.bytes[row, target])
            chosen[row] = target
            now[row] = rates[row, target]
        return tuple(chosen.tolist()), price

    def fill(self, assignment: Sequence[int]) -> Assignment:
        """Raise the units that win most for a byte while the budget allows."""
        rows = np.arange(len(self.counts))
        chosen = np.array(assignment, np.int64)
        left = self.budget - self.size(chosen)
        columns = np.arange(self.bytes.shape[1])[None]
        while True:
            extra = self.bytes - self.bytes[rows, chosen][:, None]
            gain = self.losses[rows, chosen][:, None] - self.losses
            rate = gain / np.maximum(extra, 1)
            rate[(columns <= chosen[:, None]) | (extra > left)] = -np.inf
            row, column = divmod(int(rate.argmax()), rate.shape[1])
            if rate[row, column] <= 0:
                return tuple(chosen.tolist())
            left -= int(extra[row, column])
            chosen[row] = column

    def repair(self, assignment: Sequence[int]) -> Assignment:
        """Return the assignment made to fit, with what is left over spent."""
        return self.fill(self.lower(assignment)[0])

    def greedy(self) -> Assignment:
        """Return the greedy allocation: the best of everything, repaired."""
        return self.repair(self.best)

    def fill_randomly(
        self, assignment: Sequence[int], draw: np.random.Generator
    ) -> Assignment:
        """Raise units drawn at random, a choice at a time, while the budget allows."""
        rows = np.arange(len(self.counts))
        chosen = np.array(assignment, np.int64)
        left = self.budget - self.size(chosen)
        while True:
            above = np.minimum(chosen + 1, self.counts - 1)
            extra = self.bytes[rows, above] - self.bytes[rows, chosen]
            open_ = np.flatnonzero((chosen + 1 < self.counts) & (extra <= left))
            if not len(open_):
                return tuple(chosen.tolist())
            row = int(draw.choice(open_))
            left -= int(extra[row])
            chosen[row] += 1
