"""The largest drop of loss a byte first; then exchanges while they help.

From the smallest choice of every unit on, the step that saves most predicted loss a
byte is taken, whatever its length, as long as one fits. What the end of the budget
leaves over is then used by exchanges: one unit goes up, another goes down to make room,
if the sum falls.

Source: the usual heuristic for knapsacks; HAQ and HAWQ allocate so. Limits: no proof of
anything; :mod:`compress.allocators.ilp` is exact on the same losses.
"""

from __future__ import annotations

from compress.allocators.choices import ChoiceTable
from compress.core.allocation import Allocation, AllocationProblem, Step
from compress.core.contracts import Allocator


class Greedy(Allocator):
    """Steps by loss saved a byte."""

    name = "greedy"
    summary = "the largest drop of predicted loss a byte first, then exchanges"
    source = "baseline"

    def allocate(self, problem: AllocationProblem) -> Allocation:
        """Return the assignment; measures nothing."""
        chosen = list(ChoiceTable.of(problem).fill([0] * len(problem.units)))
        room = problem.budget - problem.bytes_of(chosen)
        filled = problem.predicted_loss(chosen)
        while (exchange := _best_exchange(problem, chosen, room)) is not None:
            for unit, choice, size in exchange:
                chosen[unit], room = choice, room - size
        loss = problem.predicted_loss(chosen)
        history = (Step(0.0, filled, "filled"), Step(0.0, loss, "exchanged"))
        return Allocation(tuple(chosen), loss, 0.0, history)


_Move = tuple[int, int, int]
"""A unit, the choice that it goes to, and the bytes that it takes."""


def _moves(
    problem: AllocationProblem, chosen: list[int]
) -> list[tuple[float, int, int, int]]:
    """Return rise of loss, unit, choice and bytes of every change of one unit."""
    found = []
    for n, (unit, at) in enumerate(zip(problem.units, chosen, strict=True)):
        now = unit.choices[at]
        for index, choice in enumerate(unit.choices):
            if index != at:
                rise, size = choice.loss - now.loss, choice.bytes - now.bytes
                found.append((rise, n, index, size))
    return found


def _best_exchange(
    problem: AllocationProblem, chosen: list[int], room: int
) -> tuple[_Move, _Move] | None:
    """Return the first move down and the move up that lower the sum most."""
    moves = sorted(_moves(problem, chosen))
    up = [move for move in moves if move[0] < 0]
    down = [move for move in moves if move[0] >= 0]
    best: tuple[float, _Move, _Move] | None = None
    for gain, n, choice, size in up:
        for rise, other, lower, freed in down:
            if gain + rise >= (best[0] if best else -1e-15):
                break
            if other != n and size + freed <= room:
                best = gain + rise, (other, lower, freed), (n, choice, size)
                break
    return None if best is None else (best[1], best[2])
