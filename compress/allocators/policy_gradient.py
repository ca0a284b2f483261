"""The search of ``reinforce``: a categorical policy and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from compress.allocators.choices import Assignment, ChoiceTable
from compress.allocators.credit import Credit, step_rewards
from compress.allocators.measuring import Measurements
from compress.allocators.ramp import reward
from compress.allocators.ramp.features import Features, Walk
from compress.allocators.uniform import Uniform
from compress.core.allocation import Allocation, AllocationProblem

if TYPE_CHECKING:
    from compress.allocators.reinforce import ReinforceOptions

IMITATION_STEPS = 300
SMOOTHING = 0.3
"""Probability that imitation leaves to other choices."""

CLIP = 1.0
"""Of gradients' norms."""

IDLE = 20
"""Updates in a row that measured nothing new, until the search ends."""


def search(problem: AllocationProblem, options: ReinforceOptions) -> Allocation:
    """Update the policy until the evaluations are spent."""
    agent = Agent(problem, options)
    idle, before = 0, -1.0
    room = options.evaluations - options.samples - 1
    while agent.measured.spent <= max(room, 0) and idle < IDLE:
        agent.update(heat=1 + idle / 4)
        idle = idle + 1 if agent.measured.spent == before else 0
        before = agent.measured.spent
    return agent.measured.allocation()


class Agent:
    """The policy, and all that was measured."""

    def __init__(self, problem: AllocationProblem, options: ReinforceOptions) -> None:
        self.measured = Measurements(problem)
        self._options = options
        self._features = Features.of(problem, options.features)
        self._first = self._table = ChoiceTable.of(problem)
        self._credit = Credit(problem)
        self._known: dict[Assignment, float] = {}
        self._uniform = Uniform().allocate(problem).assignment
        self._weights = sum(unit.weights for unit in problem.units)
        self._draw = np.random.default_rng(problem.seed)
        widths = (self._features.fixed.shape[1], *options.hidden)
        layers: list[nn.Module] = []
        for inputs, outputs in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        self._choices = self._first.bytes.shape[1]
        self._net = nn.Sequential(*layers, nn.Linear(widths[-1], self._choices))
        padded = np.arange(self._choices)[None] >= self._first.counts[:, None]
        self._padded = torch.from_numpy(padded)
        rate = options.learning_rate
        self._optimizer = torch.optim.Adam(self._net.parameters(), lr=rate)
        if options.start == "predicted":
            self._imitate(self._first.greedy())

    def update(self, *, heat: float) -> None:
        """Draw assignments, measure them and the greedy rollout, and learn.

        Args:
            heat: Temperature of the draws; above 1 where they found nothing new.
        """
        base = self._rollout()
        asked = [self._rollout(heat) for _ in range(self._options.samples)]
        baseline = self._reward(base)
        rewards = [self._reward(assignment) for assignment in asked]
        if self._options.credit == "regression":
            found = list(self._known)
            losses = self._credit.losses(found, [self._known[a] for a in found])
            self._table = self._first.with_losses(losses)
            values = step_rewards(self._table)
            rows = np.arange(len(values))
            here = values[rows, list(base)]
            advantages = np.stack([values[rows, list(a)] - here for a in asked])
        else:
            gains = np.array(rewards) - baseline
            advantages = np.repeat(gains[:, None], len(self._first.counts), 1)
        self._learn(asked, advantages)

    def _rollout(self, heat: float = 0.0) -> Assignment:
        """Draw an assignment at a temperature; the most likely choices at zero."""
        walk = Walk(self._features)
        for padded in self._padded:
            with torch.no_grad():
                logits = self._net(torch.from_numpy(walk.see()))
            logits = logits.masked_fill(padded, -torch.inf)
            if heat == 0:
                walk.choose(int(logits.argmax()))
            else:
                chances = torch.softmax(logits.double() / heat, 0).numpy()
                walk.choose(int(self._draw.choice(self._choices, p=chances)))
        return tuple(walk.chosen)

    def _reward(self, asked: Assignment) -> float:
        """Measure what was asked for, made to fit; return RAMP's reward."""
        assignment = self._table.repair(asked)
        kl = self.measured(assignment, note="rollout")
        self._known[assignment] = kl
        if self._options.credit == "regression":
            return 0.0
        value = reward.quality(kl, self.measured(self._uniform, note="uniform"))
        bits = 8 / self._weights
        size, budget = self._first.size(asked), self._first.budget
        return value + reward.budget(bits * size, bits * budget)

    def _learn(self, asked: list[Assignment], advantages: NDArray[np.float64]) -> None:
        seen = torch.from_numpy(np.stack([self._features.along(a) for a in asked]))
        taken = torch.tensor(asked)
        # of one scale at each update, so that the learning rate means the same
        scaled = advantages / max(float(np.abs(advantages).mean()), 1e-9)
        weights = torch.from_numpy(scaled).float()
        first = self._log_chances(seen, taken).detach()
        for _ in range(self._options.updates):
            ratio = (self._log_chances(seen, taken) - first).exp()
            # several steps on the same draws: the ratio is clipped as in PPO
            clipped = ratio.clamp(0.8, 1.25)
            loss = -torch.minimum(ratio * weights, clipped * weights).mean()
            self._step(loss)

    def _log_chances(self, seen: Tensor, taken: Tensor) -> Tensor:
        logits = self._net(seen).masked_fill(self._padded, -torch.inf)
        chances = torch.log_softmax(logits, -1)
        return chances.gather(-1, taken[..., None]).squeeze(-1)

    def _imitate(self, choices: Assignment) -> None:
        seen = torch.from_numpy(self._features.along(choices))
        targets = torch.tensor(choices)
        for _ in range(IMITATION_STEPS):
            logits = self._net(seen).masked_fill(self._padded, -30.0)
            self._step(cross_entropy(logits, targets, label_smoothing=SMOOTHING))

    def _step(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._net.parameters(), CLIP)
        self._optimizer.step()
