"""What is trained: all weights of the blocks, low-rank changes, or virtual tokens.

Every kind holds float32 parameters under names of its own, whatever the arithmetic of
the model that they are part of, and says how fast each of them learns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from compress.core.artifact import ModelDescription
from compress.model.loading import ModelHandle
from compress.recovery.models import WholeModel
from compress.recovery.sharding import is_split, local, whole


class Trained(ABC):
    """Parameters of a model that recovery changes.

    Attributes:
        model: The model they are part of.
        parameters: By name, float32, on the model's device.
        rates: Learning rate of a parameter over the common one; 1 where none is given.
    """

    def __init__(
        self,
        model: WholeModel,
        parameters: Mapping[str, nn.Parameter],
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.model = model
        self.parameters = dict(parameters)
        self.rates = dict(rates or {})
        self._gathered: dict[str, Tensor] = {}

    def states(self, ids: Tensor) -> Tensor:
        """Return the head's input ``[B, T, C]`` for ids int64 ``[B, T]``."""
        return self.model.states(ids)

    @property
    @abstractmethod
    def weights(self) -> frozenset[str]:
        """Names of the checkpoint's tensors that training changes."""

    @abstractmethod
    def dense(self, name: str, stored: Tensor) -> Tensor:
        """Return what a tensor of the checkpoint has become, on the CPU.

        Computed in float32 and rounded once, to the type of ``stored``.

        Args:
            name: One of :attr:`weights`.
            stored: Its value before training.
        """

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies of all parameters on the CPU."""
        return {
            name: local(parameter.detach()).to("cpu", copy=True)
            for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Put the values of a snapshot back."""
        for name, parameter in self.parameters.items():
            local(parameter.detach()).copy_(snapshot[name])

    def gather(self) -> None:
        """Bring split parameters together in the first process, for :meth:`dense`.

        All processes call it.
        """
        for name, parameter in self.parameters.items():
            if is_split(parameter):
                value = whole(parameter.detach())
                if torch.distributed.get_rank() == 0:
                    self._gathered[name] = value.cpu()


class FullWeights(Trained):
    """All weights of the decoder blocks and the norm after them, in float32.

    Args:
        model: The model.
        handle: Where its weights are read.
        embeddings: Train embedding and head as well; a tied one is one parameter.
    """

    def __init__(
        self, model: WholeModel, handle: ModelHandle, *, embeddings: bool = False
    ) -> None:
        family = model.description.family
        parts: tuple[str, ...] = (f"{family.blocks}.", f"{family.final_norm}.")
        if embeddings:
            parts += (f"{family.embedding}.",)
        if embeddings and not model.description.tied:
            parts += (f"{family.head}.",)
        names = [
            name
            for name, _ in model.module.named_parameters()
            if name.startswith(parts)
        ]
        parameters = {}
        for name in names:
            known = model.module.get_parameter(name)
            if not is_split(known):
                known = promote_(model, handle, name)
            parameters[name] = known
        super().__init__(model, parameters)

    @property
    def weights(self) -> frozenset[str]:
        """Names of the checkpoint's tensors that training changes."""
        return frozenset(self.parameters)

    def dense(self, name: str, stored: Tensor) -> Tensor:
        """Return what a tensor of the checkpoint has become, on the CPU."""
        value = self._gathered.get(name, self.parameters[name].detach())
        return value.cpu().to(stored.dtype)


def norm_weights(model: ModelDescription) -> Iterator[str]:
    """Yield the names of the weights of all norms."""
    family = model.family
    paths = [
        f"{family.block(index)}.{norm}"
        for index in range(model.block_count)
        for norm in family.norms
    ]
    for path in (*paths, family.final_norm):
        if f"{path}.weight" in model.tensors:
            yield f"{path}.weight"


def promote_(model: WholeModel, handle: ModelHandle, name: str) -> nn.Parameter:
    """Replace a weight of the model by a float32 parameter; returns it."""
    values = handle.source.read(name).to(model.device, torch.float32)
    parameter = nn.Parameter(values)
    model.put_(name, parameter)
    return parameter
