"""What every transform is, and the two kinds that there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from compress.core.artifact import ModelDescription, TensorSource
from compress.core.contracts import Options
from compress.core.scheme import Scheme
from compress.transforms.operations import Step
from compress.transforms.places import Place

_AnyOptions = Options  # inside Transform the name is that of the class variable


class Transform(ABC):
    """An exact change of a model's weights.

    Attributes:
        name: The word a config uses.
        summary: One line for people.
        source: Paper and section.
        Options: Model of its options.
        unties: Whether the head needs a weight of its own.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    Options: ClassVar[type[Options]]
    unties: bool = False

    def __init__(self, options: _AnyOptions | None = None) -> None:
        self.options = options if options is not None else self.Options()

    def problem(self, model: ModelDescription) -> str | None:
        """Return why this model cannot be treated, and what to do."""
        return None


class Structural(Transform):
    """A transform that looks at weights at most, never at inputs."""

    @abstractmethod
    def step(self, model: ModelDescription, source: TensorSource) -> Step:
        """Return what happens to which tensor; reads norms only.

        Args:
            model: Untied already, if the transform needs it.
            source: The model's tensors.
        """


@dataclass(frozen=True)
class Inputs:
    """What calibration measured at one place of the dense model.

    Attributes:
        mean: float32 ``[C]``, the mean of ``|x|`` for each input column.
        largest: float32 ``[C]``, the maximum of ``|x|``.
        hessian: float32 ``[C, C]``, the sum of ``2 x x^T``; ``None`` where a transform
            does not ask for it.
    """

    mean: Tensor
    largest: Tensor
    hessian: Tensor | None


@dataclass(frozen=True)
class Reader:
    """A linear that reads the channels of a place.

    Attributes:
        weight: float32 ``[R, C]``.
        scheme: What the plan makes of it; ``None`` if it stays dense.
    """

    weight: Tensor
    scheme: Scheme | None


@dataclass(frozen=True)
class Choice:
    """What a transform decided for one place.

    Attributes:
        scale: float32 ``[channels]``, positive; ``None`` leaves the place alone.
        facts: Numbers for the report.
    """

    scale: Tensor | None
    facts: Mapping[str, Any]


class Scaling(Transform):
    """A transform that moves channel scales, chosen from what the layers are fed.

    Attributes:
        kinds: Kinds of places that it treats (``places.KINDS``).
        needs_hessian: Whether it needs second moments.
    """

    needs_hessian: ClassVar[bool] = False

    @property
    @abstractmethod
    def kinds(self) -> tuple[str, ...]:
        """Kinds of places that it treats."""

    @abstractmethod
    def choose(self, place: Place, inputs: Inputs, readers: list[Reader]) -> Choice:
        """Return the scales of one place."""
