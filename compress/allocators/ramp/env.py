"""The search as a gymnasium environment: a step is a unit, an episode the model.

An action in [-1, 1] is cut into bins of equal width over the choices of the unit. After
the last unit the assignment is made to keep the budget (the least harmful units are
lowered, and what is left over is spent), measured, and rewarded; all steps before it
are rewarded with zero. The learner gives the reward to all of them.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from compress.allocators.choices import ChoiceTable
from compress.allocators.measuring import Measurements
from compress.allocators.ramp import reward
from compress.allocators.ramp.features import LIMIT, Array, Features, Walk, bin_of
from compress.allocators.uniform import Uniform
from compress.core.allocation import AllocationProblem


class AllocationEnv(gymnasium.Env[Array, Array]):
    """One unit a step; the reward comes at the end.

    The last ``info`` of an episode holds ``asked``, what the actions chose,
    ``assignment``, what was measured, ``kl`` and ``reward``.

    Attributes:
        table: Losses that the repair goes by; a learner may replace it.
    """

    def __init__(
        self, problem: AllocationProblem, features: Features, measured: Measurements
    ) -> None:
        """Prepare the spaces; nothing is measured before the first episode ends.

        Args:
            problem: Units and budget.
            features: Of the problem.
            measured: Where assignments are measured.
        """
        size = features.fixed.shape[1]
        self.observation_space = gymnasium.spaces.Box(-LIMIT, LIMIT, (size,))
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))
        self.table = ChoiceTable.of(problem)
        self._features = features
        self._measured = measured
        self._weights = sum(unit.weights for unit in problem.units)
        self._walk = Walk(features)
        self._uniform = Uniform().allocate(problem).assignment

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Begin an episode at the first unit."""
        super().reset(seed=seed)
        self._walk = Walk(self._features)
        return self._walk.see(), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Choose for one unit; the last one ends the episode."""
        row = len(self._walk.chosen)
        count = int(self.table.counts[row])
        self._walk.choose(bin_of(float(np.asarray(action).reshape(-1)[0]), count))
        done = row + 1 == len(self.table.counts)
        if not done:
            return self._walk.see(), 0.0, False, False, {}
        info = self.finish(self._walk.chosen)
        return self._walk.see(), float(info["reward"]), True, False, info

    def finish(self, asked: list[int]) -> dict[str, Any]:
        """Repair and measure what was asked for; return the last ``info``."""
        assignment = self.table.repair(asked)
        kl = self._measured(assignment, note="episode")
        value = reward.quality(kl, self.reference)
        value += reward.budget(self._bits(asked), self._bits_of(self.table.budget))
        return {
            "asked": tuple(asked), "assignment": assignment, "kl": kl, "reward": value
        }  # fmt: skip

    @property
    def reference(self) -> float:
        """KL of the uniform allocation; the first use measures it."""
        return self._measured(self._uniform, note="uniform")

    def _bits(self, assignment: list[int]) -> float:
        return self._bits_of(self.table.size(assignment))

    def _bits_of(self, size: int) -> float:
        return 8 * size / self._weights
