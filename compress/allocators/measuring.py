"""What a search keeps: measured assignments, the best of them, and its progress."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compress.core.allocation import Allocation, AllocationProblem, Step
from compress.core.threads import on_threads


class Measurements:
    """Measures assignments of a problem once each, and remembers the best.

    The model runs with as many threads as there were when the search began, however
    few the search itself takes.

    Attributes:
        best: Assignment with the lowest KL on the whole text; empty before the first.
        objective: Its KL, nats a token.
        history: A step for each improvement.
    """

    def __init__(self, problem: AllocationProblem) -> None:
        import torch  # a config can be read without it

        self._problem = problem
        self._before = problem.evaluations
        self._known: dict[tuple[tuple[int, ...], float], float] = {}
        self._threads = torch.get_num_threads()
        self.best: tuple[int, ...] = ()
        self.objective = math.inf
        self.history: list[Step] = []

    @property
    def spent(self) -> float:
        """Evaluations of the model so far; a share of the text counts as that share."""
        return self._problem.evaluations - self._before

    def __call__(
        self, assignment: Sequence[int], *, share: float = 1.0, note: str = ""
    ) -> float:
        """Return the KL of an assignment, from memory if it was measured before.

        Args:
            assignment: Index of a choice for each unit; keeps the budget.
            share: Part of the text, in (0, 1].
            note: For the history, should it be the best so far.
        """
        key = (tuple(assignment), share)
        if key not in self._known:
            assert self._problem.fits(assignment)
            self._known[key] = self._measure(key[0], share)
        value = self._known[key]
        if share == 1.0 and value < self.objective:
            self.best, self.objective = key[0], value
            self.history.append(Step(self.spent, value, note))
        return value

    def _measure(self, assignment: tuple[int, ...], share: float) -> float:
        with on_threads(self._threads):
            return self._problem.evaluate(assignment, share=share)

    def allocation(self) -> Allocation:
        """Return the best assignment with its price."""
        return Allocation(self.best, self.objective, self.spent, tuple(self.history))
