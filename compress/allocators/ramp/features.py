"""What the policy sees of a unit, as versioned specifications.

Version ``v1`` is RAMP's list of 11. Features 4, 5, 8 and 9 (statistics of weights and
inputs) are printed with factors and caps under which most layers of a model look the
same; here they are logarithms, standardised over the units of a problem, so that a
policy does not depend on the scale of a model.

Version ``v2`` adds five that say what the choices themselves are predicted to lose:
where the greedy allocation on predicted losses puts the unit, how far the next step up
and the next step down are from the price of a byte there (logarithms), how much the
unit weighs in the budget, and how far the choices so far overspend that allocation.

Features 10 and 11 of both, and the last of ``v2``, follow the choices that were made
before; all others are fixed for a problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.allocators.choices import ChoiceTable
from compress.core.allocation import AllocationProblem
from compress.core.errors import AllocationError

SIZES = {"v1": 11, "v2": 16}
"""Number of features by version."""

LIMIT = 5.0
"""Of every feature, on both sides."""

_CODES = {"q": 0.0, "k": 0.0, "v": 0.0, "o": 0.25, "gate": 0.5, "up": 0.6, "down": 0.75}
_TINY = 1e-30
Array = NDArray[np.float32]


def centre(choice: int, count: int) -> float:
    """Return the middle of a choice's bin, for actions in [-1, 1]."""
    return (2 * choice + 1) / count - 1


def bin_of(action: float, count: int) -> int:
    """Return the choice whose bin of equal width holds an action in [-1, 1]."""
    return min(int((action + 1) / 2 * count), count - 1)


@dataclass(frozen=True)
class Features:
    """Features of the units of one problem.

    Attributes:
        version: A key of :data:`SIZES`.
        fixed: float32 ``[N, F]``; what follows earlier choices is zero.
        bytes: float64 ``[N, K]``, of each choice, as a share of the budget.
        bits: float64 ``[N, K]`` bits a weight of each choice.
        reference: float64 ``[N]``, bytes of the greedy allocation in the same share.
    """

    version: str
    fixed: Array
    bytes: NDArray[np.float64]
    bits: NDArray[np.float64]
    reference: NDArray[np.float64]

    @classmethod
    def of(cls, problem: AllocationProblem, version: str) -> Features:
        """Compute the fixed features of a problem.

        Raises:
            AllocationError: The version is unknown.
        """
        if version not in SIZES:
            raise AllocationError(
                f"unknown feature version {version!r}; known: {', '.join(SIZES)}"
            )
        table = ChoiceTable.of(problem)
        weights = np.array([[unit.weights] for unit in problem.units])
        greedy, price = table.lower(table.best)
        columns = _traits(problem)
        if version == "v2":
            columns += _predictions(table, greedy, price)
            columns += [np.zeros(len(weights))]
        fixed = np.stack(columns, 1).clip(-LIMIT, LIMIT).astype(np.float32)
        assert fixed.shape[1] == SIZES[version]
        shares = table.bytes / table.budget
        rows = np.arange(len(weights))
        bits = 8 * table.bytes / weights
        return cls(version, fixed, shares, bits, shares[rows, greedy])

    def along(self, assignment: Sequence[int]) -> Array:
        """Return float32 ``[N, F]``, what is seen at each step of an assignment."""
        rows = np.arange(len(assignment))
        bits = self.bits[rows, list(assignment)] / 8
        seen = self.fixed.copy()
        seen[1:, 9] = bits[:-1]
        seen[1:, 10] = (bits.cumsum() / (rows + 1))[:-1]
        if self.version == "v2":
            over = (self.bytes[rows, list(assignment)] - self.reference).cumsum()
            seen[1:, 15] = (10 * over[:-1]).clip(-LIMIT, LIMIT)
        return seen


class Walk:
    """Features step by step, while an assignment is being chosen."""

    def __init__(self, features: Features) -> None:
        self._features = features
        self._bits = self._over = 0.0
        self.chosen: list[int] = []

    def see(self) -> Array:
        """Return float32 ``[F]`` of the next unit; of the last one at the end."""
        features, step = self._features, len(self.chosen)
        seen: Array = features.fixed[min(step, len(features.fixed) - 1)].copy()
        if step:
            seen[9] = features.bits[step - 1, self.chosen[-1]] / 8
            seen[10] = self._bits / step / 8
            if features.version == "v2":
                seen[15] = min(max(10 * self._over, -LIMIT), LIMIT)
        return seen

    def choose(self, choice: int) -> None:
        """Take a choice for the next unit."""
        step = len(self.chosen)
        self._bits += float(self._features.bits[step, choice])
        self._over += float(self._features.bytes[step, choice])
        self._over -= float(self._features.reference[step])
        self.chosen.append(choice)


def _traits(problem: AllocationProblem) -> list[NDArray[np.float64]]:
    traits = [unit.traits for unit in problem.units]
    count = len(traits)
    zeros = np.zeros(count)
    thirds = [min(3 * t.block // max(t.blocks, 1), 2) / 2 for t in traits]
    return [
        np.arange(count) / max(count - 1, 1),
        np.log2([t.columns for t in traits]) / 16,
        np.log2([t.rows for t in traits]) / 16,
        _standardised([t.weight_std for t in traits]),
        _standardised([t.weight_mean for t in traits]),
        np.array([_CODES.get(t.role, 1.0) for t in traits]),
        np.array(thirds),
        _standardised([t.input_mean for t in traits]),
        _standardised([t.input_max for t in traits]),
        zeros,
        zeros,
    ]


def _standardised(values: Sequence[float]) -> NDArray[np.float64]:
    logs = np.log(np.maximum(values, _TINY))
    spread = float(logs.std())
    centred: NDArray[np.float64] = logs - logs.mean()
    return centred / spread if spread > 1e-9 else np.zeros(len(logs))


def _predictions(
    table: ChoiceTable, greedy: Sequence[int], price: float
) -> list[NDArray[np.float64]]:
    rows, now = np.arange(len(table.counts)), np.array(greedy)
    sizes, losses = table.bytes[rows, now], table.losses[rows, now]

    def margin(step: int) -> NDArray[np.float64]:
        """Log of the step's loss for a byte over the price; the limit at an end."""
        other = now + step
        exists = (other >= 0) & (other < table.counts)
        there = other.clip(0, table.counts - 1)
        rate = (losses - table.losses[rows, there]) / np.where(
            table.bytes[rows, there] == sizes, 1, table.bytes[rows, there] - sizes
        )
        logs = np.log(np.maximum(rate, _TINY) / max(price, _TINY))
        return np.where(exists, logs.clip(-LIMIT, LIMIT), -LIMIT * step)

    centres = [centre(int(i), int(n)) for i, n in zip(now, table.counts, strict=True)]
    weight = _standardised([float(size) for size in sizes])
    return [np.array(centres), margin(1), margin(-1), weight]
