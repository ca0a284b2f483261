"""The stage between calibration and quantizing: levels, sensitivities, the search.

Before a weight is read: what may be chosen, what it takes in the file, and whether the
budget can be kept at all. Then the level database is filled, losses are predicted, an
allocator searches, and its choice is measured as it was assembled. The cache keeps
levels and losses, so that another budget or allocator begins with the search.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from compress.allocation import sensitivity
from compress.allocation.assemble import Assembly, assembled_model
from compress.allocation.budget import budget_bytes, format_of_budget
from compress.allocation.candidates import DEFAULT_SCHEMES, Candidate, find_candidates
from compress.allocation.database import LevelMaker
from compress.allocation.journal import Assignment, Journal
from compress.allocation.outcome import Outcome, account
from compress.allocation.store import Level, LevelStore, digest, is_table
from compress.allocation.text import reward_windows
from compress.config.budget_sections import AllocateSection, BudgetSection
from compress.config.plugins import create_allocator
from compress.core.allocation import (
    Allocation,
    AllocationProblem,
    Choice,
    Traits,
    Unit,
)
from compress.core.contracts import Allocator
from compress.core.errors import ConfigError, PlanError
from compress.core.plan import LayerPlan
from compress.model.streaming import StreamedModel
from compress.progress import progress_bar
from compress.provenance import subject_digest
from compress.registry import get_allocator
from compress.timing import timed

if TYPE_CHECKING:
    from compress.calibration.data import CalibrationTokens
    from compress.pipeline import Run

_log = logging.getLogger(__name__)
_LAYOUT = 1  # counted up when losses are predicted in another way
_FISHER_TOKENS = 128  # of a window; a window is one sample, however long it is


class Search:
    """Everything between a budget and a plan, for one run.

    Args:
        run: Set up as far as its exporters.

    Raises:
        ConfigError: No export to count bytes of.
        PlanError: A layer has no choice that the formats can hold.
        AllocationError: The smallest choices exceed the budget.
    """

    def __init__(self, run: Run, budget: BudgetSection) -> None:
        self._run = run
        self.section = run.config.allocate or AllocateSection()
        quantize = run.config.quantize
        assert quantize is not None, "the config's check wants both"
        self.format = format_of_budget(budget, list(run.exporters))
        schemes = self.section.schemes or DEFAULT_SCHEMES.get(self.format)
        if schemes is None:
            raise ConfigError(
                f"allocate.schemes: format {self.format} has no usual choices; name "
                "some"
            )
        self.schemes = tuple(schemes)
        self.candidates = find_candidates(
            quantize,
            run.model,
            self.schemes,
            exporters=run.exporters,
            budget_format=self.format,
            scale_dtype=run.scale_dtype,
            quantizer=run.quantizers.__getitem__,
        )
        self.budget = budget_bytes(budget, run.base)
        self._provisional()
        self.seconds: dict[str, float] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """Plain data that decides the outcome, besides model and calibration."""
        exporter = self._run.exporters[self.format]
        return {
            "allocate": self.section.model_dump(mode="json"),
            "budget": self.budget,
            "format": self.format,
            "options": exporter.options.model_dump(mode="json"),
        }

    def _provisional(self) -> None:
        unknown = Traits("other", 0, 1, 1, 1, 0.0, 0.0, 1.0, 1.0)
        units = [
            _unit(unit, unknown, [0.0] * len(unit.options), [0.0] * len(unit.options))
            for unit in self.candidates.units
        ]
        problem = self._problem(units, measure=_unmeasured)
        found = get_allocator("uniform")().allocate(problem)
        self.provisional = self.candidates.plan(found.assignment)

    def _problem(self, units: Sequence[Unit], *, measure: Any) -> AllocationProblem:
        room = self.budget - self.candidates.fixed_bytes
        seed = self._run.config.run.seed
        return AllocationProblem(tuple(units), room, measure, seed)

    def choose(self, tokens: CalibrationTokens) -> Outcome:
        """Return the plan that the allocator chooses, and how it came about."""
        problem = self.problem(tokens)
        section = self.section
        allocator = create_allocator(
            section.method, section.options, path=("allocate", "options")
        )
        with timed(self.seconds, "search"):
            found = self._run.team.led(
                lambda measure: _searched(allocator, replace(problem, measure=measure)),
                problem.measure,
            )
        if not problem.fits(found.assignment):
            raise PlanError(
                f"allocator {section.method} exceeds the budget by "
                f"{problem.bytes_of(found.assignment) - problem.budget} bytes; this is "
                "a bug of the allocator"
            )
        with timed(self.seconds, "measure"):
            measured = problem.measure(found.assignment, 1.0)
        plan = self.candidates.plan(found.assignment)
        exporter = self._run.exporters[self.format]
        record = {
            "method": section.method,
            "options": dict(section.options),
            "format": self.format,
            "schemes": list(self.schemes),
            "sensitivity": section.sensitivity,
            "budget_bytes": self.budget,
            "file_bytes": exporter.file_bytes(plan, self._run.model),
            "fixed_bytes": self.candidates.fixed_bytes,
            **account(problem, found),
            "measured_kl": measured,
            "seconds": dict(self.seconds),
            "notes": list(self.candidates.notes),
        }
        _log.info(
            "%s: %d bytes of %d, KL %.4f predicted and %.4f measured",
            section.method,
            record["file_bytes"],
            self.budget,
            record["predicted_kl"],
            measured,
        )
        return Outcome(plan, record)

    def problem(self, tokens: CalibrationTokens) -> AllocationProblem:
        """Return the problem with everything measured that an allocator needs."""
        self._tokens = tokens
        units = self.candidates.units
        with timed(self.seconds, "levels"):
            self._levels = self._make_levels(tokens)
        errors = [
            [
                sensitivity.unit_error(option.layers, self._levels)
                for option in unit.options
            ]
            for unit in units
        ]
        with timed(self.seconds, "sensitivity"):
            losses = self._losses(errors)
        ready = [
            _unit(unit, self._traits(unit), error, loss)
            for unit, error, loss in zip(units, errors, losses, strict=True)
        ]
        return self._problem(ready, measure=self._measure)

    @cached_property
    def _store(self) -> LevelStore:
        return LevelStore()

    def _make_levels(self, tokens: CalibrationTokens) -> Mapping[LayerPlan, Level]:
        run = self._run
        maker = LevelMaker(
            run.model,
            run.transformed.source,
            run.quantizers,
            self._store,
            {
                "model": subject_digest(run),
                "transforms": run.chain.identity(),
                "calibration": tokens.digest,
                "dtype": str(run.runner.dtype),
            },
            device=run.device,
            dtype=run.runner.dtype,
            team=run.team,
        )
        wanted = [
            layer
            for unit in self.candidates.units
            for option in unit.options
            for layer in option.layers
        ]
        return maker.make([*wanted, *self.candidates.pinned.values()], tokens.tokens)

    @cached_property
    def _windows(self) -> torch.Tensor:
        """Tokens that assignments are measured on, int64 ``[N, T]``."""
        run, section = self._run, self.section
        calibration = run.config.calibration
        data = calibration.data
        return reward_windows(
            data if isinstance(data, str) else list(data),
            run.handle.tokenizer(),
            calibration=self._tokens.tokens,
            count=section.windows,
            length=section.sequence_length,
            seed=calibration.seed,
        )

    @cached_property
    def assembly(self) -> Assembly:
        """The model with any choice of levels."""
        run = self._run
        model = assembled_model(
            run.model,
            run.transformed.source,
            self._store,
            self._levels.keys(),
            device=run.device,
            dtype=torch.float32,
        )
        options = [
            [option.layers for option in unit.options] for unit in self.candidates.units
        ]
        return Assembly(model, self._windows, options, self._levels, run.team)

    def _journal(self, pinned: Sequence[LayerPlan]) -> Callable[..., float]:
        """Return the measurements with some layers of no unit put in as well.

        A single process keeps them in a file; several would have read different ones.
        """
        keys = [
            [[self._levels[layer].key for layer in option.layers] for option in options]
            for options in (unit.options for unit in self.candidates.units)
        ]
        windows = self._windows
        tokens = [list(windows.shape), digest(windows.tolist())]
        fixed = [self._levels[layer].key for layer in pinned]
        device = self._run.device.partition(":")[0]
        key = digest([_LAYOUT, "measured", keys, fixed, tokens, device])

        def measure(assignment: Assignment, share: float = 1.0) -> float:
            self.assembly.pin(pinned)
            return self.assembly.measure(assignment, share)

        if self._run.team.size > 1:
            return measure
        return Journal(self._store.folder / key[:2] / f"{key}.jsonl", measure)

    @cached_property
    def _measure(self) -> Callable[..., float]:
        """Measures with the layers that have no choice as they will be."""
        return self._journal(list(self.candidates.pinned.values()))

    @cached_property
    def _measure_alone(self) -> Callable[..., float]:
        """Measures with all other layers dense."""
        return self._journal([])

    def _losses(self, errors: Sequence[Sequence[float]]) -> list[list[float]]:
        """Return the predicted loss of each choice; from the cache if it is there."""
        section, seed = self.section, self._run.config.run.seed
        keys = [
            self._levels[layer].key
            for unit in self.candidates.units
            for option in unit.options
            for layer in option.layers
        ]
        made_with = section.model_dump(
            include={"sensitivity", "samples", "windows", "sequence_length"}
        )
        groups = [list(unit.layers) for unit in self.candidates.units]
        key = digest([_LAYOUT, made_with, seed, groups, keys])
        stored = self._run.team.alone(lambda: self._store.noted(key))
        if stored is not None and is_table(stored, like=errors):
            return [[float(x) for x in row] for row in stored]
        losses = self._predict(errors)
        self._run.team.alone(lambda: self._store.note(key, losses))
        return losses

    def _predict(self, errors: Sequence[Sequence[float]]) -> list[list[float]]:
        units, run = self.candidates.units, self._run
        inside = set(run.model.linears())
        if self.section.sensitivity == "measured":
            slopes = sensitivity.measured_slopes(units, errors, self._measure_alone)
        else:
            model = StreamedModel(run.model, run.transformed.source, device=run.device)
            windows = self._tokens.tokens[: self.section.samples, :_FISHER_TOKENS]
            slopes = run.team.alone(
                lambda: sensitivity.fisher_slopes(
                    model,
                    windows,
                    units,
                    errors,
                    levels=self._levels,
                    store=self._store,
                    seed=run.config.run.seed,
                )
            )
        losses = [sensitivity.scaled(s, e) for s, e in zip(slopes, errors, strict=True)]
        for i, unit in enumerate(units):
            if unit.layers[0] not in inside:
                losses[i] = self._measured_choices(i)
        return losses

    def _measured_choices(self, unit: int) -> list[float]:
        units = self.candidates.units
        return [
            self._measure_alone([k if j == unit else None for j in range(len(units))])
            for k in range(len(units[unit].options))
        ]

    def _traits(self, unit: Candidate) -> Traits:
        model = self._run.model
        first = unit.layers[0]
        levels = [self._levels[layer] for layer in unit.options[0].layers]
        shapes = [layer.shape for layer in unit.options[0].layers]
        role, block = _role(first, self._run)
        count = len(levels)
        return Traits(
            role,
            block,
            model.block_count,
            shapes[0][1],
            sum(rows for rows, _ in shapes),
            sum(level.weight_std for level in levels) / count,
            sum(level.weight_mean for level in levels) / count,
            sum(level.input_mean for level in levels) / count,
            max(level.input_max for level in levels),
        )


def _searched(allocator: Allocator, problem: AllocationProblem) -> Allocation:
    """Run an allocator, with a bar of the models that it measures."""
    total = getattr(allocator.options, "evaluations", None)
    best = math.inf
    bar = progress_bar(desc="search", unit="model", total=total, leave=False, delay=1)

    def measure(assignment: Sequence[int], share: float) -> float:
        nonlocal best
        value = problem.measure(assignment, share)
        best = min(best, value)
        bar.update(share)
        bar.set_postfix(best_kl=f"{best:.4f}", refresh=False)
        return value

    with bar:
        return allocator.allocate(replace(problem, measure=measure))


def _unmeasured(assignment: Sequence[int], share: float) -> float:
    raise AssertionError("uniform measures nothing")


def _unit(
    unit: Candidate, traits: Traits, errors: Sequence[float], losses: Sequence[float]
) -> Unit:
    choices = tuple(
        Choice(option.layers[0].scheme, option.bytes, error, loss)
        for option, error, loss in zip(unit.options, errors, losses, strict=True)
    )
    weights = sum(x.shape[0] * x.shape[1] for x in unit.options[0].layers)
    return Unit(unit.layers[0], unit.layers, weights, choices, traits)


def _role(layer: str, run: Run) -> tuple[str, int]:
    """Return the role of a layer and its block; those outside are at the ends."""
    model = run.model
    prefix = f"{model.family.blocks}."
    if not layer.startswith(prefix):
        is_head = layer == model.family.head
        return "other", model.block_count - 1 if is_head else 0
    number, _, path = layer.removeprefix(prefix).partition(".")
    roles = {x.path: x.role for x in model.block_linears(int(number))}
    known = ("q", "k", "v", "o", "gate", "up", "down")
    return roles[path] if roles[path] in known else "other", int(number)
