"""Which unit is to blame: losses of choices, corrected by measured assignments.

Predicted losses ``l_t(c)`` of unit ``t`` at choice ``c`` are measured one unit at a
time or come from a model of the loss; measured KLs of whole assignments show where
they are off. The KL is taken as ``sum_t l_t(c_t) (1 + z_t(c_t) . beta)``: ``beta``
holds factors of single units, and shared ones of roles, of depth and of bits. It is
the mean of the posterior of a Bayesian linear regression; the noise and the spread of
the factors are those under which the measurements are most likely (evidence).

A regression of an episode's reward on what each step contributed is how credit is
assigned under feedback for whole trajectories: Efroni, Merlis, Mannor, "Reinforcement
Learning with Trajectory Feedback", 2021. The prior at predicted losses and
the shared factors are ours: with fewer episodes than units nothing else is determined.

Limits: interactions between units are not in the model; and factors of a loss that is
predicted as zero stay without effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from compress.allocators.choices import ChoiceTable, Floats
from compress.core.allocation import AllocationProblem

NOISE = (0.002, 0.01, 0.04, 0.15)
"""Standard deviations of a KL that are tried, as shares of the mean."""

SPREAD = (0.1, 0.3, 1.0, 3.0)
"""Standard deviations of factors that are tried."""

DEPTHS = 6
"""Bumps along the depth of the model."""

LEAST = 0.05
"""A factor ``1 + z . beta`` is at least this."""


class Credit:
    """Corrects the predicted losses of a problem by what was measured."""

    def __init__(self, problem: AllocationProblem) -> None:
        self._table = ChoiceTable.of(problem)
        self._factors = _factors(problem, self._table)
        self._finite = np.where(
            np.isfinite(self._table.losses), self._table.losses, 0.0
        )

    def losses(
        self, assignments: Sequence[Sequence[int]], kls: Sequence[float]
    ) -> Floats:
        """Return corrected losses ``[N, K]``, infinite where rows are padded.

        Args:
            assignments: Measured ones, at least one.
            kls: Of each, nats a token.
        """
        chosen = np.array(assignments)
        rows = np.arange(chosen.shape[1])
        each = self._finite[rows, chosen]  # [E, N]
        factors = self._factors[rows, chosen]  # [E, N, D]
        design = np.einsum("en,end->ed", each, factors)
        # a constant takes what no unit is to blame for, such as a floor of the KL
        design = np.concatenate([design, np.full((len(kls), 1), np.mean(kls))], 1)
        rest = np.array(kls) - each.sum(1)
        beta = _posterior_mean(design, rest, float(np.mean(kls)))[:-1]
        factor = np.maximum(1 + self._factors @ beta, LEAST)
        corrected: Floats = self._table.losses * factor
        return corrected


def step_rewards(table: ChoiceTable) -> Floats:
    """Return the reward ``[N, K]`` of each choice at the price of a byte.

    The price is what the last byte saved costs the greedy allocation. A choice is worth
    its loss and its bytes at that price; the reward is zero for the best choice of a
    unit, and falls with the logarithm of what another is worse by, counted in steps of
    the unit from one choice to the next, so that all units weigh alike.
    """
    _, price = table.lower(table.best)
    worth = table.losses + price * table.bytes
    worst = worth - worth.min(1, keepdims=True)
    last = table.bytes[np.arange(len(table.counts)), table.counts - 1]
    step = (last - table.bytes[:, 0]) / np.maximum(table.counts - 1, 1)
    unit = np.maximum(price * step, np.finfo(float).tiny)[:, None]
    rewards: Floats = -np.log1p(worst / unit)
    return rewards


def _factors(problem: AllocationProblem, table: ChoiceTable) -> Floats:
    """Return ``z`` as ``[N, K, D]``: unit, unit by bits, role, depth, bits, all."""
    units = problem.units
    roles = sorted({unit.traits.role for unit in units})
    bits = 8 * table.bytes / np.array([[unit.weights] for unit in units])
    middle, width = bits.mean(), max(float(bits.std()), 1e-9)
    columns = np.zeros((*bits.shape, 2 * len(units) + len(roles) + DEPTHS + 2))
    depth = np.array([(u.traits.block + 0.5) / max(u.traits.blocks, 1) for u in units])
    bumps = np.exp(-0.5 * (DEPTHS * depth[:, None] - np.arange(DEPTHS) - 0.5) ** 2)
    for row, unit in enumerate(units):
        slope = (bits[row] - middle) / width
        columns[row, :, row] = 1
        columns[row, :, len(units) + row] = 0.5 * slope
        rest = columns[row, :, 2 * len(units) :]
        rest[:, roles.index(unit.traits.role)] = 1
        rest[:, len(roles) : -2] = bumps[row]
        rest[:, -2] = slope
        rest[:, -1] = 1
    return columns


def _posterior_mean(
    design: Floats, values: NDArray[np.float64], scale: float
) -> NDArray[np.float64]:
    """Return the coefficients under the noise and spread of largest evidence."""
    kernel = design @ design.T
    # eigenvectors once; each pair of noise and spread is then a division
    powers, vectors = np.linalg.eigh(kernel)
    turned = vectors.T @ values
    best, weights = np.inf, np.zeros(len(values))
    for noise, spread in product(NOISE, SPREAD):
        variance = spread**2 * np.maximum(powers, 0) + (noise * scale) ** 2
        cost = float((turned**2 / variance).sum() + np.log(variance).sum())
        if cost < best:
            best, weights = cost, vectors @ (spread**2 * turned / variance)
    mean: NDArray[np.float64] = design.T @ weights
    return mean
