"""Training of a policy on a problem, and a trained one's use on another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.allocators.choices import ChoiceTable, Floats
from compress.allocators.credit import Credit, step_rewards
from compress.allocators.measuring import Measurements
from compress.allocators.ramp.env import AllocationEnv
from compress.allocators.ramp.features import Array, Features, Walk, bin_of, centre
from compress.allocators.ramp.learner import Episode, Learner, Settings, act, play
from compress.allocators.ramp.policy import PolicyCard, load_policy, save_policy
from compress.core.allocation import Allocation, AllocationProblem
from compress.core.errors import AllocationError

if TYPE_CHECKING:
    from compress.allocators.ramp.allocator import RampOptions

REGRESS_EVERY = 5
"""Episodes between two regressions."""

_NOT_TRAINING = {"policy", "save_policy", "features", "hidden"}


def train(problem: AllocationProblem, options: RampOptions) -> Allocation:
    """Train a policy; return the best assignment that was measured on the way."""
    if options.save_policy is not None:
        _check_writable(options.save_policy)
    training = Training(problem, options)
    for index in range(options.warm_up + options.episodes):
        training.episode(index)
    play(training.env, lambda seen: act(training.learner.actor, seen))
    found = training.measured.allocation()
    if options.save_policy is not None:
        figures = {"objective": found.objective, "evaluations": found.evaluations}
        settings = options.model_dump(exclude=_NOT_TRAINING)
        card = PolicyCard(
            features=options.features,
            bits=bits_range(problem),
            widths=options.hidden,
            training={**settings, "seed": problem.seed, **figures},
        )
        save_policy(training.learner.actor, card, options.save_policy)
    return found


def apply(problem: AllocationProblem, folder: Path) -> Allocation:
    """Return what a saved policy chooses, made to fit; measures once.

    Raises:
        AllocationError: The policy cannot be read, or is for another range of bits.
    """
    measured = Measurements(problem)
    table = ChoiceTable.of(problem)
    measured(table.repair(asked(problem, folder)), note="policy")
    return measured.allocation()


def asked(problem: AllocationProblem, folder: Path) -> tuple[int, ...]:
    """Return what a saved policy chooses; it may exceed the budget.

    Raises:
        AllocationError: As :func:`apply`.
    """
    actor, card = load_policy(folder)
    least, most = bits_range(problem)
    if card.bits != (least, most):
        raise AllocationError(
            f"{folder}: the policy chooses among {card.bits[0]} to {card.bits[1]} "
            f"bits, the problem offers {least} to {most}; allow the same schemes or "
            "train another"
        )
    walk = Walk(Features.of(problem, card.features))
    for unit in problem.units:
        walk.choose(bin_of(act(actor, walk.see()), len(unit.choices)))
    return tuple(walk.chosen)


def bits_range(problem: AllocationProblem) -> tuple[int, int]:
    """Return the least and most nominal bits among all choices."""
    bits = [int(c.scheme.bits) for unit in problem.units for c in unit.choices]
    return min(bits), max(bits)


class Training:
    """A policy in training, with all episodes so far.

    Attributes:
        measured: What was measured.
        env: The environment; its repair goes by corrected losses.
        learner: Actor, critics and replay.
    """

    def __init__(self, problem: AllocationProblem, options: RampOptions) -> None:
        self._options = options
        self._features = Features.of(problem, options.features)
        self._table = ChoiceTable.of(problem)
        self._credit = Credit(problem)
        self._draw = np.random.default_rng(problem.seed)
        self._episodes: list[Episode] = []
        self.measured = Measurements(problem)
        self.env = AllocationEnv(problem, self._features, self.measured)
        names = Settings.__dataclass_fields__.keys() - {"seed"}
        self.learner = Learner(
            self.env,
            Settings(**{n: getattr(options, n) for n in names}, seed=problem.seed),
        )
        if options.start == "predicted":
            greedy = self._table.greedy()
            self.learner.imitate(self._features.along(greedy), greedy)

    def episode(self, index: int) -> None:
        """Play one episode, and learn from all so far once the warm-up is over."""
        warm = index < self._options.warm_up
        seen, actions, info = play(self.env, self._actor(index, warm))
        self._keep(seen, actions, info)
        regressed = self._options.credit == "regression"
        if regressed and (index + 1) % REGRESS_EVERY == 0:
            assignments = [e.choices for e in self._episodes]
            losses = self._credit.losses(assignments, [e.kl for e in self._episodes])
            self.env.table = self._table.with_losses(losses)
        if not warm:
            rewards = self._regressed() if regressed else self._broadcast()
            self.learner.learn(self._episodes, rewards, self._options.gradient_steps)

    def _actor(self, index: int, warm: bool) -> Any:
        if self._options.start == "random":
            return (lambda _: self._draw.uniform(-1, 1)) if warm else self.learner.act
        if index == 0:  # what was imitated, undisturbed
            return lambda seen: act(self.learner.actor, seen)
        return self.learner.act

    def _keep(self, seen: Array, actions: Array, info: dict[str, Any]) -> None:
        """Remember an episode: as measured where steps are blamed, else as asked."""
        chosen, asked = info["assignment"], info["asked"]
        if self._options.credit == "regression":
            seen = self._features.along(chosen)
            changed = np.array(chosen) != np.array(asked)
            pairs = zip(chosen, self._table.counts, strict=True)
            middles = np.array([[centre(c, int(n))] for c, n in pairs], np.float32)
            actions = np.where(changed[:, None], middles, actions)
        else:
            chosen = asked
        self._episodes.append(
            Episode(seen, actions, chosen, info["reward"], info["kl"])
        )

    def _regressed(self) -> list[Floats]:
        """Return rewards ``[N]`` of each episode by the corrected losses."""
        values = step_rewards(self.env.table)
        rows = np.arange(len(values))
        return [values[rows, list(e.choices)] for e in self._episodes]

    def _broadcast(self) -> list[Floats]:
        """Return the reward of an episode for each of its steps."""
        count = len(self._table.counts)
        return [np.full(count, episode.reward) for episode in self._episodes]


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise AllocationError(
            f"cannot save the policy in {folder}: {error}; give another save_policy"
        ) from error
