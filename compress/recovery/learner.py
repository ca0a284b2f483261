"""What a training run changes, and how one step changes it.

The loop knows text, teacher, time and files; a learner knows its numbers. Between the
backward pass and :meth:`Learner.step` gradients lie wherever the learner has put its
leaves in the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.config.recover_section import RecoverOptions
from compress.distributed.team import Team
from compress.recovery.checkpoints import optimizer_tensors, restore_optimizer_
from compress.recovery.models import WholeModel
from compress.recovery.sharding import Leaves
from compress.recovery.trained import Trained

_BETAS = (0.9, 0.95)


class Learner(ABC):
    """Something of a model that is trained.

    Attributes:
        model: The model; what it computes follows every step.
    """

    model: WholeModel

    def states(self, ids: Tensor) -> Tensor:
        """Return the head's input ``[B, T, C]`` for ids int64 ``[B, T]``."""
        return self.model.states(ids)

    def ready(self, used: float) -> float:
        """Make the model ready for the passes of a step.

        Args:
            used: Share of the budget that is used by then.

        Returns:
            Where on the curve of the rate the step is, 0 to 1: ``used``, unless
            training has phases with curves of their own.
        """
        return used

    def as_stored(self) -> None:  # noqa: B027 - most learners always do
        """Let the model compute with what would be stored now, to be measured."""

    @abstractmethod
    def step(self, rate: float, *, number: int, team: Team) -> Tensor:
        """Use up the gradients that are there: change everything once.

        Args:
            rate: Between 0 and 1, of the learning rates.
            number: Steps before this one.
            team: The processes, whose gradients are averaged first.

        Returns:
            float32 ``[2]`` on the device, each 0 or 1: whether a gradient was not
            finite, so that no weight has changed; and whether all were zero.
        """

    @abstractmethod
    def snapshot(self) -> dict[str, Tensor]:
        """Return copies on the CPU of all that decides what the model computes."""

    @abstractmethod
    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Put the values of a snapshot back."""

    @abstractmethod
    def memory(self) -> dict[str, Tensor]:
        """Return what else a run needs to go on, such as moments of gradients."""

    @abstractmethod
    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`memory` returned."""


class AdamLearner(Learner):
    """Trains parameters with AdamW, without weight decay, gradients clipped.

    Args:
        trained: The parameters.
        options: Learning rate and clipping.
    """

    def __init__(self, trained: Trained, options: RecoverOptions) -> None:
        self.trained, self.model = trained, trained.model
        self._options = options
        self._leaves = Leaves(trained.parameters)
        self._optimizer = torch.optim.AdamW(
            _groups(self._leaves.values, trained.rates),
            betas=_BETAS,
            weight_decay=0.0,
            fused=True,
        )

    def states(self, ids: Tensor) -> Tensor:
        """Return the head's input ``[B, T, C]`` for ids int64 ``[B, T]``."""
        return self.trained.states(ids)

    def step(self, rate: float, *, number: int, team: Team) -> Tensor:
        """Change the parameters once; a gradient that is not finite changes nothing."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.learning_rate * rate * group["factor"]
        self._leaves.receive_(team)
        norm = self._leaves.clip_(self._options.clip, team)
        # The fused kernels leave weights and moments alone if this is 1, which keeps
        # the decision on the device; torch's GradScaler tells them in the same way.
        skipped = (~torch.isfinite(norm)).float()
        self._optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return torch.stack([skipped, (norm == 0).float()])

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies of all parameters on the CPU."""
        return self.trained.snapshot()

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Put the values of a snapshot back."""
        self.trained.restore(snapshot)

    def memory(self) -> dict[str, Tensor]:
        """Return step counts and moments."""
        return optimizer_tensors(self._optimizer, self._leaves.values)

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`memory` returned."""
        restore_optimizer_(self._optimizer, self._leaves.values, memory)


def _groups(
    leaves: Mapping[str, nn.Parameter], rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return the optimizer's groups: parameters that learn equally fast."""
    groups: dict[float, list[Tensor]] = {}
    for name, leaf in leaves.items():
        groups.setdefault(rates.get(name, 1.0), []).append(leaf)
    return [{"params": group, "factor": factor} for factor, group in groups.items()]
