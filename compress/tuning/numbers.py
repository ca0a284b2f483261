"""Adam with steps relative to what they change.

Each leaf keeps its moments and the count of its steps, since leaves may come later than
others. Where a leaf holds a stack of matrices, the step of each is as long, relative to
the matrix, as the rate says.

Source: Kingma and Ba (2015), Adam; You et al. (2020), LAMB, arXiv 1904.00962.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.distributed.team import Team
from compress.tuning.steps import direction, relative

BETAS = (0.9, 0.95)


@dataclass
class _Moments:
    """Running means of the gradient of one leaf, and of its square."""

    first: Tensor
    second: Tensor
    steps: int = 0


class RelativeAdam:
    """Moments of leaves, by name, and what they do to the leaves."""

    def __init__(self) -> None:
        self._moments: dict[str, _Moments] = {}

    def add(self, leaves: Mapping[str, Tensor]) -> None:
        """Take leaves in, float32, that have made no step."""
        for name, leaf in leaves.items():
            self._moments[name] = _Moments(
                torch.zeros_like(leaf), torch.zeros_like(leaf)
            )

    def forget(self, name: str) -> None:
        """Let a leaf go that is trained no more."""
        del self._moments[name]

    @torch.no_grad()
    def move_(
        self,
        name: str,
        value: Tensor,
        gradient: Tensor,
        rates: Tensor,
        *,
        stacked: bool | None,
        team: Team | None = None,
    ) -> None:
        """Change a leaf.

        Args:
            name: Of the leaf.
            value: The leaf, float32.
            gradient: As ``value``.
            rates: ``[]`` on the device.
            stacked: Whether it holds matrices ``[B, ...]`` that have steps relative to
                each, or is one matrix; ``None`` for steps of absolute size.
            team: The processes, if each has some rows of the matrices only.
        """
        moments = self._moments[name]
        change = direction(
            gradient,
            moments.second,
            beta=BETAS[1],
            number=moments.steps,
            first=moments.first,
            first_beta=BETAS[0],
        )
        moments.steps += 1
        if stacked:
            change *= relative(value, change, team)
        elif stacked is not None:
            change *= relative(value[None], change[None])[0]
        value.sub_(change.mul_(rates))

    def memory(self) -> dict[str, Tensor]:
        """Return moments and counts; moments are not copied."""
        found = {}
        for name, moments in self._moments.items():
            found[f"first/{name}"] = moments.first
            found[f"second/{name}"] = moments.second
            found[f"steps/{name}"] = torch.tensor(moments.steps)
        return found

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`memory` returned."""
        for name, moments in self._moments.items():
            moments.first.copy_(memory[f"first/{name}"])
            moments.second.copy_(memory[f"second/{name}"])
            moments.steps = int(memory[f"steps/{name}"])
