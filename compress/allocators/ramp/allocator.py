"""RAMP: a policy that chooses unit by unit, learned by soft actor-critic.

Source: "RAMP: Reinforcement Adaptive Mixed Precision Quantization for Efficient On
Device LLM Inference". Kept are the environment, the 11 features (``features: v1``), the
terminal reward (corrected, see ``reward``), the networks and the learner. The defaults
differ, so that a few hundred episodes are enough:

- ``features: v2`` also shows what choices are predicted to lose;
- ``start: predicted``: the policy first imitates the greedy allocation on predicted
  losses, where the paper draws 20 episodes at random;
- ``credit: regression``: steps are rewarded by what a regression over all episodes
  blames them for; the paper gives the reward of the episode to each of its steps;
- ``gamma: 0``, since rewards of steps are then whole.

The paper's are ``features: v1``, ``start: random``, ``credit: episode``, ``gamma: .99``
and one gradient step for each step of an episode.

A saved policy is applied to another model without training (``policy``): one
measurement, and predicted losses only where features or the repair ask for them.

Limits: with ``credit: regression`` interactions between units are not learned; bins of
actions are those of the choices, so that a policy serves the range of bits it saw.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from compress.allocators.isolation import isolated
from compress.core.allocation import Allocation, AllocationProblem
from compress.core.contracts import Allocator, Options


class RampOptions(Options):
    """Options of ``ramp``."""

    policy: Path | None = Field(
        default=None,
        description="Folder of a saved policy, applied as it is: nothing is trained.",
    )
    save_policy: Path | None = Field(
        default=None, description="Folder that the trained policy is written into."
    )
    warm_up: int = Field(
        default=20, ge=0, description="Episodes before the first gradient step."
    )
    episodes: int = Field(default=200, ge=1, description="Episodes with training.")
    features: Literal["v1", "v2"] = Field(
        default="v2", description="v1: the paper's 11; v2: and predicted losses."
    )
    start: Literal["predicted", "random"] = Field(
        default="predicted",
        description="Imitate the greedy allocation first, or warm up at random.",
    )
    credit: Literal["regression", "episode"] = Field(
        default="regression",
        description="Rewards of steps: regressed on all episodes, or the episode's.",
    )
    hidden: tuple[int, ...] = Field(
        default=(512, 512, 256), min_length=1, description="Widths of the networks."
    )
    learning_rate: float = Field(default=3e-4, gt=0, description="Of Adam.")
    gamma: float = Field(default=0.0, ge=0, le=1, description="Discount of a step.")
    tau: float = Field(
        default=0.005, gt=0, le=1, description="Of the critics' moving average."
    )
    batch: int = Field(default=128, ge=2, description="Steps in a gradient step.")
    replay: int = Field(default=30_000, ge=1, description="Steps that are kept.")
    gradient_steps: int = Field(
        default=32, ge=1, description="Gradient steps after each episode."
    )
    entropy: float = Field(
        default=0.2, gt=0, description="First weight of the entropy; it is learned."
    )
    target_entropy: float = Field(default=-1.0, description="Of an action, in nats.")

    @model_validator(mode="after")
    def _trained_or_applied(self) -> RampOptions:
        if self.policy is not None and self.save_policy is not None:
            raise ValueError("policy trains nothing that save_policy could write")
        return self


class Ramp(Allocator):
    """A policy learned by soft actor-critic; the best assignment that it tried."""

    name = "ramp"
    summary = "a policy learned by soft actor-critic; serves other models too"
    source = "RAMP: Reinforcement Adaptive Mixed Precision Quantization"
    Options: ClassVar[type[Options]] = RampOptions
    options: RampOptions

    def allocate(self, problem: AllocationProblem) -> Allocation:
        """Return the best assignment measured, or a saved policy's.

        Raises:
            AllocationError: The policy cannot be read, is for another range of bits, or
                cannot be written.
        """
        from compress.allocators.ramp import training  # torch and stable-baselines3

        with isolated(problem.seed):
            if self.options.policy is not None:
                return training.apply(problem, self.options.policy)
            return training.train(problem, self.options)
