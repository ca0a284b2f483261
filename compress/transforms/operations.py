"""What a transform does to one tensor.

Operations are small: vectors, and factors of orthogonal matrices. They take float32
tensors as transformers stores them, matrices ``[R, C]`` (outputs by inputs) or biases
``[R]``, and return new ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from compress.transforms.orthogonal import Orthogonal


class Operation(ABC):
    """A change of one tensor."""

    rowwise: bool = False
    """Whether each row changes by itself, so that runs of rows can be treated alone."""

    @abstractmethod
    def apply(self, tensor: Tensor) -> Tensor:
        """Return the changed tensor; the argument may be overwritten."""


@dataclass(frozen=True)
class ScaleColumns(Operation):
    """Multiply column ``j`` by ``scale[j]``; scale is float32 ``[C]``."""

    scale: Tensor
    rowwise = True

    def apply(self, tensor: Tensor) -> Tensor:
        """Return ``W diag(scale)``."""
        return tensor.mul_(self.scale)


@dataclass(frozen=True)
class DivideRows(Operation):
    """Divide the rows from ``start`` on by ``scale``, float32 ``[n]``.

    Attributes:
        scale: One number for each row that changes.
        start: First of them; others, in a fused matrix, stay.
    """

    scale: Tensor
    start: int = 0

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the matrix, or the bias, with these rows divided."""
        rows = tensor[self.start : self.start + len(self.scale)]
        rows.div_(self.scale.view(-1, *[1] * (tensor.dim() - 1)))
        return tensor


@dataclass(frozen=True)
class DivideGain(Operation):
    """Divide what a norm multiplies by, ``weight + offset``, by ``scale`` ``[C]``."""

    scale: Tensor
    offset: int

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the weight of a norm whose gain is divided."""
        return (tensor + self.offset) / self.scale - self.offset


@dataclass(frozen=True)
class SetGain(Operation):
    """Let a norm multiply by one."""

    offset: int

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the weight of a norm that multiplies by one."""
        return tensor.fill_(1 - self.offset)


@dataclass(frozen=True)
class RotateColumns(Operation):
    """Turn the inputs: ``W -> W R``, each run of ``R``'s size by itself."""

    rotation: Orthogonal
    rowwise = True

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the matrix for an input ``x`` that was replaced by ``R^T x``."""
        return self.rotation.apply(tensor)


@dataclass(frozen=True)
class RotateRows(Operation):
    """Turn the outputs: ``W -> R^T W``, each run of ``R``'s size by itself.

    Attributes:
        rotation: ``R``.
        start: First row that changes; others, in a fused matrix, stay.
        count: How many rows change; all from ``start`` on by default.
    """

    rotation: Orthogonal
    start: int = 0
    count: int | None = None

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the matrix, or the bias, with its outputs turned."""
        stop = None if self.count is None else self.start + self.count
        rows = tensor[self.start : stop]
        turned = self.rotation.apply(rows.T.contiguous() if rows.dim() > 1 else rows)
        rows.copy_(turned.T if rows.dim() > 1 else turned)
        return tensor


@dataclass(frozen=True)
class Step:
    """What one transform does to a whole model.

    Attributes:
        operations: By tensor name, in the order in which they apply.
        copies: Tensors that the model did not have, by the name of the one that each
            starts as a copy of.
    """

    operations: Mapping[str, Sequence[Operation]]
    copies: Mapping[str, str] = field(default_factory=dict)
