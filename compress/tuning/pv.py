"""PV-Tuning: gradients for what is continuous, projections for codes.

A step has two parts. P changes scales, minima, tables and dense weights by Adam, with
steps relative to what they change. V moves the wanted weights ``b`` against the
gradient and gives the units that are farthest from what they want the code nearest to
it:

    v = b2 v + (1 - b2) g^2,   u = g / sqrt(v)          no first moment for codes
    b = w - lr u |w| / |u|                              w is b itself if wishes add up
    S = the ceil(tau U) units of largest |b - decode()|
    code_j = argmin |b_j - decode(code)|^2   for j in S
    b = (1 - d) b + d decode()                          d: delta decay

With ``tau = 1`` this is straight-through estimation; without adding wishes up it is the
linearised V step of the paper, in a subspace if ``tau < 1``. The gradient of P is taken
at the old codes; V sees the numbers that P has just changed.

Source: Malinovskii et al. (2024), "PV-Tuning: beyond straight-through estimation for
extreme LLM compression", arXiv 2405.14852, algorithms 1 and 2, and its public
implementation for the buffer, LAMB steps and trust ratio. What differs: learning rates
fall by a cosine, shares are larger in short runs, and numbers are rounded to their
storage type whenever the model is evaluated. Limits: integer zero points, and whole
numbers that scales are stored as, stay. On a GPU gradients of tables are sums in no
fixed order, so two runs agree to rounding only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.config.tune_section import PVOptions
from compress.core.artifact import TensorSource
from compress.core.tensors import QuantizedTensor
from compress.distributed.team import Team
from compress.recovery.models import WholeModel
from compress.tuning.coded import TunedModel, usable
from compress.tuning.numbers import BETAS
from compress.tuning.stacks import Stack
from compress.tuning.steps import direction, relative, selected, trusted


class PVTuner(TunedModel):
    """Trains a model's codes and continuous parts by PV-Tuning.

    Args:
        model: The compressed model.
        source: Where dense weights are read.
        codes: Of each layer that is tuned.
        options: Regime and rates.
    """

    def __init__(
        self,
        model: WholeModel,
        source: TensorSource,
        codes: Mapping[str, QuantizedTensor],
        options: PVOptions,
    ) -> None:
        super().__init__(model, source, codes, options)
        self._options = options
        self._seconds: list[Tensor] = []
        self._wanted: list[Tensor] = []
        if options.changes_codes:
            self._seconds = [_like(stack) for stack in self.stacks]
        if options.keeps_wishes:
            with torch.no_grad():
                self._wanted = [stack.codes.decode() for stack in self.stacks]

    def memory(self) -> dict[str, Tensor]:
        """Return moments, and what units want."""
        found = self.adam.memory()
        found |= {f"codes/{n}": second for n, second in enumerate(self._seconds)}
        return found | {f"wanted/{n}": wish for n, wish in enumerate(self._wanted)}

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`memory` returned."""
        self.adam.remember(memory)
        for number, second in enumerate(self._seconds):
            second.copy_(memory[f"codes/{number}"])
        for number, wish in enumerate(self._wanted):
            wish.copy_(memory[f"wanted/{number}"])

    def _change(self, rate: float, finite: Tensor, *, number: int, team: Team) -> None:
        for index, stack in enumerate(self.stacks):
            before = self.train_numbers(index, rate, finite, team=team)
            if self._options.changes_codes:
                own = self._options.code_rate(stack.codes.scheme.code_bits)
                asked = finite * (rate * own)
                gradient = usable(stack.gradient, finite)
                self._choose_codes(
                    index,
                    before,
                    gradient,
                    rate=asked,
                    finite=finite,
                    number=number,
                    team=team,
                )
            stack.refresh_()
        self.train_dense(rate, finite)

    @torch.no_grad()
    def _choose_codes(
        self,
        index: int,
        before: Tensor,
        gradient: Tensor,
        *,
        rate: Tensor,
        finite: Tensor,
        number: int,
        team: Team,
    ) -> None:
        """V: give the units that are farthest from what they want other codes."""
        options, codes = self._options, self.stacks[index].codes
        target = self._wanted[index] if options.keeps_wishes else before.clone()
        change = direction(gradient, self._seconds[index], beta=BETAS[1], number=number)
        rows = team if self.stacks[index].split else None
        change *= relative(target, change, rows) * rate
        target -= change  # in place: what units want is kept
        present = codes.decode()
        wishes = codes.group_norms(target - present)
        limited = options.trust_ratio is not None
        units = selected(wishes, options.share, ordered=limited)
        old = codes.chosen(units)
        new = codes.project(
            target, units, beam=options.beam, order=self._order(codes.codes, number)
        )
        kept = finite.expand(old.shape[:2])
        if options.trust_ratio is not None:
            moved = codes.values(new, units) - codes.values(old, units)
            limit = present.flatten(1).square().sum(1) * options.trust_ratio**2
            kept = kept & trusted(moved.square().sum(-1), limit)
        codes.replace_(torch.where(kept.unsqueeze(-1), new, old), units)
        if options.keeps_wishes and options.delta_decay:
            target.lerp_(codes.decode(), options.delta_decay)

    def _order(self, codes: Tensor, number: int) -> list[int]:
        """Return in which order tables are visited: another one each step."""
        count = codes.shape[2]
        if count == 1:
            return [0]
        seed = self._options.seed * 1_000_003 + number
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(count, generator=generator).tolist()


def _like(stack: Stack) -> Tensor:
    return torch.zeros_like(stack.live, dtype=torch.float32)
