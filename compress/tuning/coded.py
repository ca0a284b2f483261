"""A model whose weights are made from codes, and what of it is trained.

Matrices of one shape and scheme are a *stack*: their values lie in one tensor ``[B, R,
C]`` in the model's arithmetic, of which the model's weights are views, and so do their
gradients. A step over all layers is thus a few operations a stack. Dense weights (norms
and, if wanted, embedding and head) are kept in float32 beside what the model computes
with: their values as they will be stored.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.config.tune_section import TuneOptions
from compress.core.artifact import ModelDescription, TensorSource
from compress.core.scales import TORCH_DTYPES
from compress.core.tensors import QuantizedTensor
from compress.distributed.team import Team
from compress.recovery.learner import Learner
from compress.recovery.models import WholeModel
from compress.recovery.trained import norm_weights
from compress.tuning.numbers import RelativeAdam
from compress.tuning.stacks import stacks_of


@dataclass(frozen=True)
class DenseWeight:
    """A weight that stays dense and is trained.

    Attributes:
        name: Of the checkpoint's tensor.
        value: float32 leaf.
        live: What the model computes with.
        stored: Type in which it is stored.
    """

    name: str
    value: Tensor
    live: nn.Parameter
    stored: torch.dtype

    @torch.no_grad()
    def refresh_(self) -> None:
        """Put the value, rounded as it is stored, into the model."""
        self.live.copy_(self.value.to(self.stored))


class TunedModel(Learner):
    """A model of stacks and dense weights, whichever way they are trained.

    A method of tuning says what a step does, and which numbers besides these it keeps.

    Args:
        model: The compressed model; its coded layers get new weights.
        source: Where dense weights are read.
        codes: Of each layer that is tuned, by name.
        options: Which dense weights are trained.
    """

    def __init__(
        self,
        model: WholeModel,
        source: TensorSource,
        codes: Mapping[str, QuantizedTensor],
        options: TuneOptions,
    ) -> None:
        self.model = model
        self.stacks = list(stacks_of(model, codes))
        names = dense_names(model.description, codes, options)
        self.dense_weights = [_promote_(model, source, name) for name in names]
        self.adam = RelativeAdam()
        self.adam.add(self.parameters())
        self._rate = options.rate
        self.refresh_()

    def refresh_(self) -> None:
        """Put all values into the model."""
        for stack in self.stacks:
            stack.refresh_()
        for weight in self.dense_weights:
            weight.refresh_()

    def parameters(self) -> dict[str, Tensor]:
        """Return the float32 leaves that are trained, by a name of their own."""
        found = {
            f"{number}/{name}": value
            for number, stack in enumerate(self.stacks)
            for name, value in stack.codes.continuous_parameters().items()
        }
        return found | {weight.name: weight.value for weight in self.dense_weights}

    def trained_values(self, team: Team) -> int:
        """Return how many numbers are trained, in all processes together."""
        count = sum(weight.value.numel() for weight in self.dense_weights)
        for stack in self.stacks:
            for name, value in stack.codes.continuous_parameters().items():
                has_part = stack.team_of(name, team) is not None
                count += value.numel() * (team.size if has_part else 1)
        return count

    def result(self) -> dict[str, QuantizedTensor]:
        """Return the stored form of each layer, by name.

        Where blocks are split every process asks, and the first one gets it.
        """
        return {k: v for stack in self.stacks for k, v in stack.result().items()}

    def dense(self) -> dict[str, Tensor]:
        """Return the dense weights that were trained, as stored, on the CPU."""
        return {w.name: w.value.to(w.stored).cpu() for w in self.dense_weights}

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies on the CPU of codes and numbers."""
        return {k: v.to("cpu", copy=True) for k, v in self._state().items()}

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Put codes and numbers back."""
        for name, value in self._state().items():
            value.copy_(snapshot[name])
        self.refresh_()

    def _state(self) -> dict[str, Tensor]:
        found = {
            f"{number}/{name}": value
            for number, stack in enumerate(self.stacks)
            for name, value in stack.codes.state().items()
        }
        return found | {w.name: w.value.detach() for w in self.dense_weights}

    def step(self, rate: float, *, number: int, team: Team) -> Tensor:
        """Use up the gradients that are there: change everything once."""
        for stack in self.stacks:
            stack.receive_(team)
        team.average_gradients_([weight.live for weight in self.dense_weights])
        norm = self._gradient_norm(team)
        finite = torch.isfinite(norm)
        self._change(rate, finite, number=number, team=team)
        for stack in self.stacks:
            stack.gradient.zero_()
        for weight in self.dense_weights:
            weight.live.grad = None
        return torch.stack([(~finite).float(), (norm == 0).float()])

    def train_numbers(
        self, index: int, rate: float, finite: Tensor, *, team: Team
    ) -> Tensor:
        """Change the numbers beside a stack's codes; return the values before.

        The model is not refreshed.

        Args:
            index: Of the stack.
            rate: Between 0 and 1, of the learning rate.
            finite: bool ``[]``; where it is false nothing changes.
            team: Averages what is summed without an order.
        """
        stack = self.stacks[index]
        numbers = stack.codes.continuous_parameters()
        with torch.enable_grad():
            values = stack.codes.decode()
        gradient = usable(stack.gradient, finite)
        found = torch.autograd.grad(values, list(numbers.values()), gradient)
        gradients = dict(zip(numbers, found, strict=True))
        stack.average_(gradients, team)
        rates = finite * (rate * self._rate)
        for name, value in numbers.items():
            self.adam.move_(
                f"{index}/{name}",
                value,
                gradients[name],
                rates,
                stacked=True,
                team=stack.team_of(name, team),
            )
        stack.codes.settle_()
        return values.detach()

    def train_dense(self, rate: float, finite: Tensor) -> None:
        """Change dense weights by their gradients, and refresh them."""
        rates = finite * (rate * self._rate)
        for weight in self.dense_weights:
            if weight.live.grad is not None:
                own = usable(weight.live.grad, finite)
                stacked = False if weight.value.dim() > 1 else None
                # Norms may lie around 0: their steps are relative to nothing.
                self.adam.move_(weight.name, weight.value, own, rates, stacked=stacked)
                weight.refresh_()

    def _gradient_norm(self, team: Team) -> Tensor:
        """Return the length of all gradients; not finite in all if in one process."""
        gradients = [stack.gradient for stack in self.stacks]
        gradients += [
            w.live.grad for w in self.dense_weights if w.live.grad is not None
        ]
        norms = [
            torch.linalg.vector_norm(gradient, dtype=torch.float32)
            for gradient in gradients
        ]
        total = torch.stack(norms).double().square().sum()
        if self.model.is_split:
            team.add_([total])
        return total.sqrt()

    @abstractmethod
    def _change(self, rate: float, finite: Tensor, *, number: int, team: Team) -> None:
        """Change codes and numbers by averaged gradients, and refresh the model.

        Args:
            rate: Between 0 and 1, of the learning rates.
            finite: bool ``[]`` on the device; where it is false nothing may change.
            number: Steps before this one.
            team: Whatever is not the same in all processes is averaged.
        """


def usable(gradient: Tensor, finite: Tensor) -> Tensor:
    """Return a gradient in float32; zeros if it must not be used."""
    return torch.where(finite, gradient.float(), torch.zeros((), device=finite.device))


def dense_names(
    model: ModelDescription, coded: Iterable[str], options: TuneOptions
) -> list[str]:
    """Return the dense weights that are trained.

    Args:
        model: The compressed model.
        coded: Names of layers that are no dense weights.
        options: Say which.
    """
    names = list(norm_weights(model)) if options.norms else []
    if options.embeddings:
        ends = [model.family.embedding, *([] if model.tied else [model.family.head])]
        names += [f"{name}.weight" for name in ends if name not in set(coded)]
    return names


def _promote_(model: WholeModel, source: TensorSource, name: str) -> DenseWeight:
    """Make a dense weight of the model a leaf, with a float32 value beside it."""
    read = source.read(name)
    value = read.to(model.device, torch.float32, copy=True).requires_grad_()
    live = nn.Parameter(torch.zeros_like(value, dtype=model.dtype))
    model.put_(name, live)
    stored = TORCH_DTYPES[source.tensors()[name].dtype]
    return DenseWeight(name, value, live, stored)
