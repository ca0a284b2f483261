"""REINFORCE without a critic: the greedy rollout is the baseline, after ReMax.

A small network reads RAMP's features of a unit and gives probabilities of its choices.
Each update draws a few assignments and compares them with the assignment of the most
likely choices: the difference is the advantage. Steps are rewarded as in ``ramp``, by a
regression over all that was measured, or by the reward of the whole assignment.

Source: Li et al., "ReMax: A Simple, Effective, and Efficient Reinforcement Learning
Method for Aligning Large Language Models", 2023, algorithm 1. What differs: advantages
of steps where ReMax has one for the whole sequence; the first policy imitates the
greedy allocation on predicted losses.

Limits: with ``credit: regression`` interactions between units are not learned.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compress.allocators.isolation import isolated
from compress.core.allocation import Allocation, AllocationProblem
from compress.core.contracts import Allocator, Options


class ReinforceOptions(Options):
    """Options of ``reinforce``."""

    evaluations: float = Field(default=220, ge=1, description="Measurements at most.")
    samples: int = Field(default=4, ge=1, description="Assignments for an update.")
    updates: int = Field(
        default=10, ge=1, description="Gradient steps on each set of assignments."
    )
    features: Literal["v1", "v2"] = Field(
        default="v2", description="v1: the paper's 11; v2: and predicted losses."
    )
    start: Literal["predicted", "random"] = Field(
        default="predicted", description="Imitate the greedy allocation first, or not."
    )
    credit: Literal["regression", "episode"] = Field(
        default="regression",
        description="Rewards of steps: regressed on all measured, or the episode's.",
    )
    hidden: tuple[int, ...] = Field(
        default=(64, 64), min_length=1, description="Widths of the network."
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="Of Adam.")


class Reinforce(Allocator):
    """Policy gradients against the policy's own greedy rollout."""

    name = "reinforce"
    summary = "policy gradients against the policy's own greedy rollout"
    source = "ReMax, Li et al. 2023, algorithm 1"
    Options: ClassVar[type[Options]] = ReinforceOptions
    options: ReinforceOptions

    def allocate(self, problem: AllocationProblem) -> Allocation:
        """Return the best assignment that was measured."""
        from compress.allocators.policy_gradient import search  # torch

        with isolated(problem.seed):
            return search(problem, self.options)
