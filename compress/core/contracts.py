"""The plug-in contracts. Built-ins and outside plug-ins register the same way.

A plug-in is a class named by an entry point in ``compress.quantizers``,
``compress.pruners``, ``compress.allocators`` or ``compress.exporters``. Its options are
a frozen pydantic model, checked with the same messages as the rest of the config.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from compress.core.allocation import Allocation, AllocationProblem
from compress.core.artifact import CompressedModel, ModelDescription
from compress.core.continuous import BlockTuning
from compress.core.errors import SchemeError
from compress.core.neurons import GatedMLP, NeuronStatistics, keep_largest
from compress.core.plan import Plan
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor


class Options(BaseModel):
    """Base of every plug-in's options: unknown keys are errors, values are fixed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Problem:
    """Why a plan cannot be carried out, found before any work.

    Attributes:
        where: Layer or option.
        message: What is wrong, and what to do.
    """

    where: str
    message: str


_AnyOptions = Options  # inside Plugin the name is that of the class variable


class Plugin(ABC):
    """What all plug-ins declare.

    Attributes:
        name: The word a config uses.
        summary: One line for ``compress list``.
        source: Paper and section, or the format's specification.
        Options: Model of the plug-in's options.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    Options: ClassVar[type[Options]] = Options

    def __init__(self, options: _AnyOptions | None = None) -> None:
        self.options = options if options is not None else self.Options()


class Quantizer(Plugin):
    """Turns one weight matrix into codes.

    ``needs_statistics`` says whether calibration has to run; a quantizer that does not
    need statistics is handed ``None``. ``transforms`` names the exact transforms of the
    model that belong to the method; a run applies them after those that its config
    lists, unless it lists them itself.
    """

    needs_statistics: bool = False
    transforms: ClassVar[tuple[str, ...]] = ()

    @property
    def needs_drift(self) -> bool:
        """Whether statistics must hold ``drift``, which takes a second forward pass."""
        return False

    @abstractmethod
    def schemes(self) -> tuple[str, ...]:
        """Names of schemes an allocator may choose, most bits first."""

    def supports(self, scheme: Scheme) -> bool:
        """Whether this quantizer can produce ``scheme``.

        By default any scheme on a grid without a low-rank correction; one that ends
        with ``low_rank.correct`` can say yes to all grids.
        """
        return not scheme.rank and scheme.codebook is None

    def obstacle(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Return why a matrix should not get a scheme, and which would do instead.

        By default nothing speaks against a scheme that is supported.

        Args:
            scheme: One that :meth:`supports` says yes to and whose groups fit.
            shape: Rows and columns.
        """
        return None

    @abstractmethod
    def quantize(
        self, weight: Tensor, scheme: Scheme, statistics: LayerStatistics | None
    ) -> QuantizedTensor:
        """Return the codes of ``weight``.

        Args:
            weight: ``[R, C]``, any float type; not changed.
            scheme: Its group size divides ``C``.
            statistics: Of the inputs of this layer, if the method needs them.
        """

    def quantize_alike(
        self,
        weights: Sequence[Tensor],
        scheme: Scheme,
        statistics: Sequence[LayerStatistics | None],
    ) -> list[QuantizedTensor]:
        """Return the codes of matrices of one shape, such as those of experts.

        Each is what :meth:`quantize` returns, bit for bit; a method that can do them at
        once in less time overrides this.

        Args:
            weights: ``[R, C]`` of each; not changed.
            scheme: Of all.
            statistics: Of the inputs of each.
        """
        pairs = zip(weights, statistics, strict=True)
        return [self.quantize(weight, scheme, known) for weight, known in pairs]

    def codes_rows_apart(self, scheme: Scheme) -> bool:
        """Whether a row's codes are the same whatever rows lie beside it.

        Then the rows of one matrix may be coded by several processes. By default no; a
        method that treats each row by itself answers
        :attr:`~compress.core.scheme.Scheme.rows_are_independent`.
        """
        return False

    @property
    def block_tuning(self) -> BlockTuning | None:
        """How the layers of a block are tuned together after they are coded, if so."""
        return None

    def takes_importance(self, scheme: Scheme) -> bool:
        """Whether :meth:`quantize_by_importance` is implemented for ``scheme``."""
        return False

    def quantize_by_importance(
        self, weight: Tensor, scheme: Scheme, importance: Tensor
    ) -> QuantizedTensor:
        """Return the codes of ``weight`` for known importances of its columns.

        Args:
            weight: ``[R, C]``, any float type; not changed.
            scheme: One that :meth:`takes_importance` says yes to.
            importance: float32 ``[C]``, proportional to ``E[x^2]`` of each input.

        Raises:
            SchemeError: :meth:`takes_importance` says no.
        """
        raise SchemeError(f"{self.name} does not take importances for {scheme.name}")


class Pruner(Plugin):
    """Ranks the neurons of one MLP; how many stay is not its business.

    Attributes:
        needs_activations: Whether it asks for statistics; if not, it gets ``None``.
        budgets: How the neurons to remove are dealt to blocks unless a config says it.
        depth_share: Part of the removed parameters that goes as whole blocks, likewise.
    """

    needs_activations: ClassVar[bool] = True
    budgets: ClassVar[str] = "cfsp"
    depth_share: ClassVar[float] = 0.0

    @property
    def needs_gradients(self) -> bool:
        """Whether statistics must hold ``effect``, which takes a backward pass."""
        return False

    @abstractmethod
    def scores(self, mlp: GatedMLP, statistics: NeuronStatistics | None) -> Tensor:
        """Return a finite score for each neuron, ``[I]``; the largest are kept."""

    def select(
        self,
        mlp: GatedMLP,
        statistics: NeuronStatistics | None,
        keep: int,
        protected: Tensor | None = None,
    ) -> Tensor:
        """Return the ascending indices of the neurons that stay, int64 ``[keep]``.

        Args:
            mlp: Dense; not changed.
            statistics: Of its inner activations, if the method needs them.
            keep: How many stay, at least one.
            protected: Indices that have to be among them.
        """
        return keep_largest(self.scores(mlp, statistics), keep, protected)


class Allocator(Plugin):
    """Chooses a scheme for each unit of the model, under a budget of bytes.

    It never sees a module or a file: only the problem, which knows the choices with
    their bytes and predicted losses, and measures an assignment when asked.
    """

    @abstractmethod
    def allocate(self, problem: AllocationProblem) -> Allocation:
        """Return an assignment that keeps the budget.

        The same problem with the same seed gives the same assignment.

        Raises:
            AllocationError: The allocator cannot work on this problem.
        """


@dataclass(frozen=True)
class ExportResult:
    """Files that an exporter wrote.

    Attributes:
        files: Paths, the main file first.
        size_bytes: Sum of the weight files' sizes on disk.
        notes: What a report should say, such as tensors that took another type.
    """

    files: tuple[Path, ...]
    size_bytes: int
    notes: tuple[str, ...] = ()


class Exporter(Plugin):
    """Writes a compressed model as files that a stock consumer loads."""

    consumer: ClassVar[str]
    """The program that reads the files, for messages."""

    @property
    def keeps_codes(self) -> bool:
        """Whether the files hold the plan's codes, so that they can be compared."""
        return True

    @property
    def needs_input_squares(self) -> bool:
        """Whether :meth:`write` asks the model for ``input_squares``."""
        return False

    @abstractmethod
    def check(self, plan: Plan, model: ModelDescription) -> list[Problem]:
        """List what this format cannot hold. Reads no weights."""

    @abstractmethod
    def tensor_bytes(self, plan: Plan, model: ModelDescription) -> Mapping[str, int]:
        """Return the exact bytes of each stored matrix, by module or tensor name."""

    def file_bytes(self, plan: Plan, model: ModelDescription) -> int:
        """Return the bytes of the weight files that :meth:`write` makes.

        Headers and metadata count where they are in these files; by default there are
        none.
        """
        return sum(self.tensor_bytes(plan, model).values())

    def bound_layers(self, model: ModelDescription) -> Sequence[tuple[str, ...]]:
        """Return sets of layers that must have one scheme here; by default none."""
        return ()

    @abstractmethod
    def write(self, artifact: CompressedModel, folder: Path) -> ExportResult:
        """Write all files into the empty ``folder``, one tensor in memory at a time."""

    @abstractmethod
    def read_codes(self, folder: Path, layer: str) -> QuantizedTensor:
        """Decode one layer of the plan from the written files, with our own reader."""

    @abstractmethod
    def replay(self, folder: Path, windows: Tensor) -> Iterator[Tensor]:
        """Run the files in their stock consumer.

        Args:
            folder: What :meth:`write` filled.
            windows: int64 ``[N, T]`` token ids; each row is a forward pass of its own.

        Yields:
            float32 logits ``[T, V]`` for each window.

        Raises:
            MissingDependencyError: The consumer is not installed.
        """

    def serve(self, folder: Path, windows: Tensor) -> Iterator[Tensor] | None:
        """Run the files exactly as their users do, where that differs from replaying.

        :meth:`replay` may take away what is the consumer's choice and not the file's,
        such as rounding activations. ``None``, the default, means that it does not.
        """
        return None
