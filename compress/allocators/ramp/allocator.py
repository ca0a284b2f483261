"""RAMP draft."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from compress.allocators.choices import ChoiceTable, Floats
from compress.allocators.credit import Credit
from compress.allocators.isolation import isolated
from compress.allocators.measuring import Measurements
from compress.core.allocation import Allocation, AllocationProblem
from compress.core.contracts import Allocator, Options
from compress.core.errors import AllocationError

if TYPE_CHECKING:
    from compress.allocators.ramp.learner import Episode, Learner


class RampOptions(Options):
    """Options of ``ramp``."""

    warm_up: int = Field(default=20, ge=0)
    episodes: int = Field(default=200, ge=0)
    features: Literal["v1", "v2"] = "v2"
    start: Literal["predicted", "random", "both"] = "predicted"
    credit: Literal["regression", "broadcast"] = "regression"
    standardise: bool = True
    hidden: tuple[int, ...] = (512, 512, 256)
    learning_rate: float = 3e-4
    gamma: float = 0.0
    tau: float = 0.005
    batch: int = 128
    gradient_steps: int = 32
    entropy: float = 0.2
    target_entropy: float = -1.0
    greedy: bool = False
    log: bool = True


class Ramp(Allocator):
    name = "ramp"
    summary = "a policy learned by soft actor-critic; transfers to other models"
    source = "RAMP"
    Options: ClassVar[type[Options]] = RampOptions
    options: RampOptions

    def allocate(self, problem: AllocationProblem) -> Allocation:
        with isolated(problem.seed):
            return self._train(problem)

    def _train(self, problem):
        from compress.allocators.ramp.env import AllocationEnv
        from compress.allocators.ramp.features import Features, centre
        from compress.allocators.ramp.learner import Episode, Learner, Settings, act
        o = self.options
        measured = Measurements(problem)
        features = Features.of(problem, o.features)
        env = AllocationEnv(problem, features, measured)
        learner = Learner(env, Settings(o.hidden, o.learning_rate, o.gamma, o.tau, o.batch, o.entropy, o.target_entropy, problem.seed))
        self.learner = learner
        draw = np.random.default_rng(problem.seed)
        base = ChoiceTable.of(problem)
        if o.start != "random":
            g = base.greedy()
            learner.imitate(features.along(g), g)
        credit = Credit(problem)
        episodes = []
        losses = base.losses
        rewards = []
        for i in range(o.warm_up + o.episodes):
            if i < o.warm_up and o.start != "predicted":
                a = lambda s: float(draw.uniform(-1, 1))
            else:
                a = learner.act
            seen, actions, info = learner.play(a)
            if o.credit == "regression":
                ch = info["assignment"]
                asked = info["asked"]
                actions = np.array([[actions[t,0] if ch[t]==asked[t] else centre(ch[t], int(base.counts[t]))] for t in range(len(ch))], np.float32)
                seen = features.along(ch)
            else:
                ch = info["asked"]
            episodes.append(Episode(seen, actions, ch, info["reward"], info["kl"]))
            if o.credit == "regression" and (i % 5 == 4):
                losses = credit.losses([e.choices for e in episodes], [e.kl for e in episodes])
                env.table = base.with_losses(losses)
                if o.greedy: measured(env.table.greedy(), note="credit")
            if o.credit == "regression":
                table = base.with_losses(losses)
                _, price = table.lower(table.best)
                total = losses + price * base.bytes
                step = (base.bytes[np.arange(len(base.counts)), base.counts-1]-base.bytes[:,0])/np.maximum(base.counts-1,1)
                adv = -(total - total.min(1, keepdims=True)) / np.maximum(price*step, 1e-30)[:,None]
                adv = -np.log1p(-adv) if o.log else adv.clip(-5, 0)
                rewards = [adv[np.arange(len(ch)), e.choices] for e in episodes]
            else:
                r = np.array([e.reward for e in episodes])
                if o.standardise:
                    r = (r - r.mean()) / (r.std() + 1e-9) * np.sqrt(len(base.counts))
                rewards = [np.full(len(base.counts), x) for x in r]
            if i >= o.warm_up:
                learner.learn(episodes, rewards, o.gradient_steps)
        _, _, info = learner.play(lambda s: act(learner.actor, s, deterministic=True))
        self.final = info
        self.episodes = episodes
        return measured.allocation()
