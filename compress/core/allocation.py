"""The problem of mixed precision: one choice for each unit, under a budget of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from compress.core.errors import AllocationError
from compress.core.scheme import Scheme


@dataclass(frozen=True)
class Choice:
    """A scheme that a unit may take, and what is known of it before any search.

    Attributes:
        scheme: Of all layers of the unit.
        bytes: Of the unit in the exported file.
        error: Relative error of the weights, weighted by the second moments of the
            inputs: ``tr(E H E^T) / tr(W H W^T)``, over all layers of the unit.
        loss: Predicted rise of the model's KL in nats a token if only this unit takes
            this choice; what additive models of the loss add up.
    """

    scheme: Scheme
    bytes: int
    error: float
    loss: float


@dataclass(frozen=True)
class Traits:
    """What a learned policy sees of a unit. Raw values; policies scale them.

    Attributes:
        role: ``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down`` or ``other``; the
            first layer's for a unit of several.
        block: Index of the decoder block.
        blocks: Number of decoder blocks of the model.
        columns: Width of the input.
        rows: Outputs, all layers together.
        weight_std: Standard deviation of the weights.
        weight_mean: Mean magnitude of the weights.
        input_mean: Root of the mean square of the inputs over columns and tokens.
        input_max: Root of the largest mean square of a column.
    """

    role: str
    block: int
    blocks: int
    columns: int
    rows: int
    weight_std: float
    weight_mean: float
    input_mean: float
    input_max: float


@dataclass(frozen=True)
class Unit:
    """Layers that must take the same scheme; mostly a single one.

    Attributes:
        name: Of the first layer.
        layers: Module names.
        weights: Number of weights, all layers together.
        choices: Fewest bytes first; at least one.
        traits: For learned policies.
    """

    name: str
    layers: tuple[str, ...]
    weights: int
    choices: tuple[Choice, ...]
    traits: Traits


Evaluate = Callable[[Sequence[int], float], float]
"""KL in nats a token of an assignment, on the given share of the search's text."""


@dataclass
class AllocationProblem:
    """What an allocator is handed: units, a budget, and a way to measure.

    An assignment is a sequence with the index of a choice for each unit.

    Attributes:
        units: In model order.
        budget: Bytes for the choices of all units; what is fixed is already taken off.
        measure: Measures an assignment; allocators call :meth:`evaluate`.
        seed: Of every random choice.
        evaluations: How often the model was measured so far; a measurement on a share
            of the text counts as that share.
    """

    units: tuple[Unit, ...]
    budget: int
    measure: Evaluate
    seed: int = 0
    evaluations: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        """Raise if not even the smallest choices keep the budget."""
        least = self.bytes_of([0] * len(self.units))
        if least > self.budget:
            raise AllocationError(
                f"the budget leaves {self.budget} bytes for the layers; the smallest "
                f"choices take {least}; raise the budget by {least - self.budget} "
                "bytes or allow smaller schemes"
            )

    def bytes_of(self, assignment: Sequence[int]) -> int:
        """Return the bytes of an assignment."""
        pairs = zip(self.units, assignment, strict=True)
        return sum(unit.choices[i].bytes for unit, i in pairs)

    def predicted_loss(self, assignment: Sequence[int]) -> float:
        """Return the sum of the choices' own losses, in nats a token."""
        pairs = zip(self.units, assignment, strict=True)
        return sum(unit.choices[i].loss for unit, i in pairs)

    def fits(self, assignment: Sequence[int]) -> bool:
        """Whether an assignment keeps the budget."""
        return self.bytes_of(assignment) <= self.budget

    def evaluate(self, assignment: Sequence[int], *, share: float = 1.0) -> float:
        """Measure the model with these choices.

        Args:
            assignment: Index of a choice for each unit.
            share: Part of the search's text to measure on, in (0, 1].

        Returns:
            KL to the original model, nats a token.
        """
        self.evaluations += share
        return self.measure(tuple(assignment), share)


@dataclass(frozen=True)
class Step:
    """One line of an allocator's progress.

    Attributes:
        evaluations: Spent so far.
        best: Lowest objective so far, in nats a token.
        note: What happened, in a word or two.
    """

    evaluations: float
    best: float
    note: str = ""


@dataclass(frozen=True)
class Allocation:
    """What an allocator decided.

    Attributes:
        assignment: Index of a choice for each unit; keeps the budget.
        objective: KL that the allocator itself measured or predicted, nats a token.
        evaluations: How often the model was measured.
        history: Progress of the search, for a plot.
    """

    assignment: tuple[int, ...]
    objective: float
    evaluations: float
    history: tuple[Step, ...] = ()
