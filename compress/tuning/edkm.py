"""Differentiable k-means: weights learn through palettes that follow them.

The run has two phases. In the first, master weights that start near the dense weights
are trained, and the model computes with their soft values; tables are functions of the
weights (:mod:`compress.tuning.dkm`):

    w~ = A C(w),   w <- w - lr Adam(dL/dw) |w| / |Adam|        alpha falls
    q  = argmin_j |w - C_j|                                    the snap

In the second, codes are fixed, and tables (and scales of rows) are trained as PV does.
Norms and other dense weights are trained in both. The rate falls by a cosine in each.
Soft values are made once a step, outside the model: passes, gradient checkpoints and
processes only add to the gradients ``dL/dw~``, which go back to the masters once.

What is measured is always what would be stored: for the measurement codes are snapped
and tables rounded, while the masters stay. The first measurement is that of the
calibrated palette, so the result is never worse than that on held-out text.

Rates, on SmolLM2-135M off its grid, palette3, steps of 512 tokens, held-out KL 0.868 at
the start: at 3e-3 it was 1.33 after 6 steps and 1.14 after 12 (with masters that began
nearer to the borders of their cells, too); at 5e-4, the default of short runs, 0.803
after 6. Tiny models take 1e-2.

Source: Cho et al. (2022), "DKM", arXiv 2108.12659; Cho et al. (2023), "eDKM", arXiv
2309.00964. What differs: distillation, steps relative to the weights, a softness that
falls, tables trained at the end. Limits: palettes with one table; k-means counts all
weights alike; some 22 bytes a weight while they are soft; on a GPU it waits for the
number of distinct values once for each shape of a matrix and step, and gradients are
sums in no fixed order, so two runs agree to rounding only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.config.tune_section import EdkmOptions
from compress.core.artifact import TensorSource
from compress.core.tensors import QuantizedTensor
from compress.distributed.team import Team
from compress.recovery.models import WholeModel
from compress.tuning.coded import TunedModel, usable
from compress.tuning.dkm.palette import Schedule, SoftPalettes
from compress.tuning.stacks import Stack


class EdkmTuner(TunedModel):
    """Trains a model's weights under palettes, then the palettes.

    Args:
        model: The compressed model.
        source: Where dense weights are read.
        originals: Where the weights are read that the codes stand for.
        codes: Of each layer that is tuned.
        options: Phases, softness and rates.
    """

    def __init__(
        self,
        model: WholeModel,
        source: TensorSource,
        originals: TensorSource,
        codes: Mapping[str, QuantizedTensor],
        options: EdkmOptions,
    ) -> None:
        super().__init__(model, source, codes, options)
        self._options = options
        self._soft_share = 1 - options.table_share
        schedule = Schedule(options.softness, options.last_softness, options.iterations)
        self._palettes = []  # none once codes are fixed
        for stack in self.stacks:
            weights = [originals.read(f"{name}.weight") for name in stack.names]
            dense = torch.stack([w.to(model.device, torch.float32) for w in weights])
            starts = [codes[name] for name in stack.names]
            self._palettes.append(SoftPalettes(dense, starts, schedule))
        self.adam.add({_master(n): p.master for n, p in enumerate(self._palettes)})
        self._values: list[Tensor] = []  # of the step that is under way
        self._share: float | None = None  # of the soft phase, at the last step

    def ready(self, used: float) -> float:
        """Put soft values into the model; or fix the codes, once it is time.

        Returns:
            The share of the phase that is used.
        """
        if self._palettes and used >= self._soft_share:
            self.as_stored()
            self._harden()
        if not self._palettes:
            return (used - self._soft_share) / self._options.table_share
        self._share = used / self._soft_share
        self._values = [palettes.soft(self._share) for palettes in self._palettes]
        for stack, values in zip(self.stacks, self._values, strict=True):
            stack.live.copy_(values.detach())
        return self._share

    def as_stored(self) -> None:
        """Snap the weights to codes, which the model then computes with."""
        if self._share is None:  # no step was taken, or codes are fixed
            return
        for stack, palettes in zip(self.stacks, self._palettes, strict=True):
            _store_(stack, *palettes.snap(self._share))

    def memory(self) -> dict[str, Tensor]:
        """Return moments; while weights are soft, these and their tables."""
        found = self.adam.memory()
        for number, palettes in enumerate(self._palettes):
            found |= {f"{k}/{number}": v for k, v in palettes.state().items()}
        return found

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`memory` returned."""
        if "master/0" not in memory:
            self._harden()
        for number, palettes in enumerate(self._palettes):
            palettes.load({k: memory[f"{k}/{number}"] for k in palettes.state()})
        self.adam.remember(memory)

    def _harden(self) -> None:
        """Let the master weights go."""
        for number in range(len(self._palettes)):
            self.adam.forget(_master(number))
        self._palettes, self._values, self._share = [], [], None

    def _change(self, rate: float, finite: Tensor, *, number: int, team: Team) -> None:
        if self._palettes:
            self._train_weights(rate, finite, team=team)
        else:
            for index, stack in enumerate(self.stacks):
                self.train_numbers(index, rate, finite, team=team)
                stack.refresh_()
        self.train_dense(rate, finite)

    def _train_weights(self, rate: float, finite: Tensor, *, team: Team) -> None:
        """Take gradients of soft values back to the master weights, and use them."""
        rates = finite * (rate * self._options.weight_rate)
        for number, palettes in enumerate(self._palettes):
            gradient = usable(self.stacks[number].gradient, finite)
            values = self._values[number]
            (found,) = torch.autograd.grad(values, palettes.master, gradient)
            team.average_([found])  # sums without an order differ between processes
            self.adam.move_(
                _master(number), palettes.master, found, rates, stacked=True
            )
            palettes.advance_()
        self._values = []


def _master(number: int) -> str:
    return f"{number}/master"


@torch.no_grad()
def _store_(stack: Stack, tables: Tensor, codes: Tensor) -> None:
    """Give a stack tables and codes, and put what they mean into the model."""
    stack.codes.continuous_parameters()["tables"].copy_(tables)
    stack.codes.replace_(codes, None)
    stack.refresh_()
