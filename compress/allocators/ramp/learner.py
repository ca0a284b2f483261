"""Soft actor-critic of stable-baselines3 on the environment, episode by episode.

The loop is ours, so that an episode's reward reaches all its steps: episodes are kept
whole, and rewards of the replay buffer are written again when more is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from torch.nn.utils import clip_grad_norm_

from compress.allocators.ramp.env import AllocationEnv
from compress.allocators.ramp.features import Array, centre
from compress.allocators.ramp.policy import NormalisedActor, NormalisedPolicy

CLIP = 1.0
"""Of gradients' norms."""

IMITATION_STEPS = 400
SPREAD = 0.09
"""Standard deviation that imitation gives to actions: entropy -1, SAC's target."""


@dataclass(frozen=True)
class Episode:
    """One pass over the units, as the learner sees it.

    Attributes:
        seen: float32 ``[N, F]``.
        actions: float32 ``[N, 1]``.
        choices: What was chosen at each step.
        reward: Of the whole.
        kl: Measured, nats a token.
    """

    seen: Array
    actions: Array
    choices: tuple[int, ...]
    reward: float
    kl: float


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of the learner; see the allocator's options."""

    hidden: tuple[int, ...]
    learning_rate: float
    gamma: float
    tau: float
    batch: int
    replay: int
    entropy: float
    target_entropy: float
    seed: int


class Learner:
    """Actor, critics and replay of one problem."""

    def __init__(self, env: AllocationEnv, settings: Settings) -> None:
        self._env = env
        self._settings = settings
        self.sac = SAC(
            NormalisedPolicy,
            env,
            learning_rate=settings.learning_rate,
            buffer_size=max(settings.replay, len(env.table.counts)),
            batch_size=settings.batch,
            tau=settings.tau,
            gamma=settings.gamma,
            ent_coef=f"auto_{settings.entropy}",
            target_entropy=settings.target_entropy,
            policy_kwargs={"net_arch": list(settings.hidden)},
            seed=settings.seed,
            device="cpu",
        )
        self.sac.set_logger(Logger(None, []))  # nothing printed, nothing written
        for part in (self.sac.actor, self.sac.critic):
            part.optimizer.register_step_pre_hook(_clipper(part))

    @property
    def actor(self) -> NormalisedActor:
        """The policy itself."""
        actor = self.sac.actor
        assert isinstance(actor, NormalisedActor)
        return actor

    def act(self, seen: Array) -> float:
        """Draw an action of the current policy."""
        return act(self.actor, seen, deterministic=False)

    def imitate(self, seen: Array, choices: tuple[int, ...]) -> None:
        """Teach the actor to take given choices, with the spread of SAC's target.

        Args:
            seen: float32 ``[N, F]`` along the assignment.
            choices: The assignment.
        """
        counts = self._env.table.counts
        pairs = zip(choices, counts, strict=True)
        targets = torch.tensor([[centre(c, int(n))] for c, n in pairs])
        spread = torch.log(SPREAD / (1 - targets.square())).clamp(max=0)
        states = torch.from_numpy(seen)
        optimizer = torch.optim.Adam(self.actor.parameters(), lr=1e-3)
        for _ in range(IMITATION_STEPS):
            mean, log_std, _ = self.actor.get_action_dist_params(states)
            loss = (mean - torch.atanh(targets)).square().mean()
            loss = loss + (log_std - spread).square().mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def learn(
        self, episodes: list[Episode], rewards: list[NDArray[np.float64]], steps: int
    ) -> None:
        """Write the latest episodes into the replay buffer and take gradient steps.

        Args:
            episodes: Oldest first.
            rewards: Of each step ``[N]``, for each episode.
            steps: Gradient steps.
        """
        buffer = self.sac.replay_buffer
        assert isinstance(buffer, ReplayBuffer)
        length = len(rewards[0])
        keep = max(buffer.buffer_size // length, 1)
        buffer.reset()
        for episode, reward in zip(episodes[-keep:], rewards[-keep:], strict=True):
            place = slice(buffer.pos, buffer.pos + length)
            following = np.concatenate([episode.seen[1:], episode.seen[-1:]])
            buffer.observations[place, 0] = episode.seen
            buffer.next_observations[place, 0] = following
            buffer.actions[place, 0] = episode.actions
            buffer.rewards[place, 0] = reward
            buffer.dones[place, 0] = 0
            buffer.dones[place.stop - 1, 0] = 1
            buffer.pos += length
        self.sac.train(steps, self._settings.batch)


def play(
    env: AllocationEnv, act: Callable[[Array], float]
) -> tuple[Array, Array, dict[str, Any]]:
    """Run an episode; return features, actions and the last ``info``."""
    seen, _ = env.reset()
    states, actions, done = [], [], False
    info: dict[str, Any] = {}
    while not done:
        action = act(seen)
        states.append(seen)
        actions.append([action])
        seen, _, done, _, info = env.step(np.array([action], np.float32))
    return np.stack(states), np.array(actions, np.float32), info


def act(actor: NormalisedActor, seen: Array, *, deterministic: bool = True) -> float:
    """Return an action in [-1, 1] for features ``[F]``."""
    with torch.no_grad():
        return float(actor(torch.from_numpy(seen)[None], deterministic))


def _clipper(part: torch.nn.Module) -> Callable[..., None]:
    def clip(*_: object) -> None:
        clip_grad_norm_(part.parameters(), CLIP)

    return clip
