"""What may be chosen: units, their candidates, and exact bytes in the exported file.

Bytes come from the exporter that the budget is of: it is asked for the sizes of one
plan for each candidate scheme, so that whatever it does to a layer is counted as it
will be done. Candidates that a layer or a format cannot have are left out here, before
anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from compress.config.schema import DENSE, QuantizeSection
from compress.core.artifact import ModelDescription
from compress.core.contracts import Exporter, Quantizer
from compress.core.errors import PlanError
from compress.core.plan import LayerPlan, Plan
from compress.planning.planner import (
    layer_plan,
    layer_problems,
    listed,
    override_of,
    unused_overrides,
)

DEFAULT_SCHEMES = {
    "gguf": (
        *("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k"),
        *("iq4_nl", "q4_0", "q5_0", "q5_1", "q8_0"),
    ),
    "safetensors": ("int3-g64", "int4-g64", "int5-g64", "int6-g64", "int8-g64"),
}
"""What a layer may become where ``allocate.schemes`` does not say, by format."""

# Names of schemes and of the file are part of some headers; they differ by less.
_NAME_BYTES = 64


@dataclass(frozen=True)
class Option:
    """One scheme that a unit may take: its layers' plans, and bytes in the file."""

    layers: tuple[LayerPlan, ...]
    bytes: int


@dataclass(frozen=True)
class Candidate:
    """Layers that take one scheme together, and which; fewest bytes first."""

    layers: tuple[str, ...]
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Candidates:
    """All that can be chosen, and what cannot.

    Attributes:
        model: What is to be compressed.
        pinned: Layers whose scheme an override sets.
        units: In model order.
        fixed_bytes: Of the file without the units' layers.
        notes: Candidates that were left out.
    """

    model: ModelDescription
    pinned: Mapping[str, LayerPlan]
    units: tuple[Candidate, ...]
    fixed_bytes: int
    notes: tuple[str, ...] = ()

    def plan(self, assignment: Sequence[int]) -> Plan:
        """Return the plan of an assignment, in model order."""
        pairs = zip(self.units, assignment, strict=True)
        chosen = [unit.options[index].layers for unit, index in pairs]
        return _plan(self.model, self.pinned, chosen)


def find_candidates(
    section: QuantizeSection,
    model: ModelDescription,
    schemes: Sequence[str],
    *,
    exporters: Mapping[str, Exporter],
    budget_format: str,
    scale_dtype: str,
    quantizer: Callable[[str], Quantizer],
) -> Candidates:
    """Return units with the choices that all formats can hold; reads no weights.

    Args:
        section: The config's ``quantize``; overrides with a scheme pin their layers.
        model: What is to be compressed.
        schemes: Names of the choices.
        exporters: By format.
        budget_format: Whose bytes count.
        scale_dtype: Storage type of scales.
        quantizer: Returns a method by name.

    Raises:
        PlanError: A pin cannot be kept, or a layer has no choice left; with reasons.
    """
    search = _Search(section, model, exporters, scale_dtype, quantizer)
    pinned = search.pinned()
    groups = search.groups()
    by_scheme = {s: search.coded(groups, s, pinned) for s in schemes}
    exporter = exporters[budget_format]
    sized = {
        scheme: exporter.tensor_bytes(_plan(model, pinned, layers.values()), model)
        for scheme, layers in by_scheme.items()
    }
    units = []
    for group in groups:
        options: dict[tuple[LayerPlan, ...], Option] = {}
        for scheme, layers in by_scheme.items():
            if group in layers:
                size = sum(sized[scheme].get(name, 0) for name in group)
                options.setdefault(layers[group], Option(layers[group], size))
        if options:
            ordered = sorted(options.values(), key=lambda option: option.bytes)
            units.append(Candidate(group, tuple(ordered)))
        elif not search.is_outside(group):
            raise PlanError(
                f"allocate.schemes: {group[0]} can have none of {', '.join(schemes)}:\n"
                + listed(search.reasons)
            )
    if not units:
        raise PlanError("allocate: overrides set the scheme of every layer")
    found = Candidates(model, pinned, tuple(units), 0, tuple(search.notes()))
    plans = list(_samples(found))
    search.require(plans[-1])
    fixed = max(_fixed_bytes(exporter, plan, found) for plan in plans)
    return Candidates(model, pinned, tuple(units), fixed, found.notes)


def _samples(found: Candidates) -> Iterable[Plan]:
    """Yield plans of one rank of choices each, and last one that mixes them all."""
    most = max(len(unit.options) for unit in found.units)
    for rank in range(most):
        yield found.plan([min(rank, len(u.options) - 1) for u in found.units])
    yield found.plan([i % len(u.options) for i, u in enumerate(found.units)])


def _fixed_bytes(exporter: Exporter, plan: Plan, found: Candidates) -> int:
    model = found.model
    sizes = exporter.tensor_bytes(plan, model)
    searched = sum(sizes.get(name, 0) for unit in found.units for name in unit.layers)
    return exporter.file_bytes(plan, model) - searched + _NAME_BYTES


def _plan(
    model: ModelDescription,
    pinned: Mapping[str, LayerPlan],
    chosen: Iterable[Sequence[LayerPlan]],
) -> Plan:
    layers = dict(pinned) | {x.name: x for part in chosen for x in part}
    order = [model.family.embedding, *model.linears(), model.family.head]
    return Plan(model.label, {name: layers[name] for name in order if name in layers})


class _Search:
    """Asks planner, methods and formats what each layer may become."""

    def __init__(
        self,
        section: QuantizeSection,
        model: ModelDescription,
        exporters: Mapping[str, Exporter],
        scale_dtype: str,
        quantizer: Callable[[str], Quantizer],
    ) -> None:
        self._section, self._model = section, model
        self._exporters, self._scale_dtype = exporters, scale_dtype
        self._quantizer = quantizer
        self.reasons: list[str] = []
        ends = [model.family.embedding]
        ends += [] if model.tied else [model.family.head]
        self._ends = ends
        self._names = [*ends, *model.linears()]
        self._bound = [
            bound
            for exporter in exporters.values()
            for bound in exporter.bound_layers(model)
        ]

    def is_outside(self, group: Sequence[str]) -> bool:
        """Whether a unit is the embedding or the head, which may stay as they are."""
        return group[0] in self._ends

    def notes(self) -> list[str]:
        """Return what was left out, one line of each kind."""
        return listed(self.reasons).splitlines()

    def _pin(self, name: str) -> bool:
        override = override_of(self._section, name)
        return override is not None and override.scheme is not None

    def pinned(self) -> dict[str, LayerPlan]:
        """Return the layers whose scheme is set; those that are kept dense are out."""
        problems = unused_overrides(self._section, self._model)
        found = {}
        for name in filter(self._pin, self._names):
            layer = self._layer(name, None)
            if layer is not None:
                found[name] = layer
                method = self._quantizer(layer.method)
                problems += layer_problems(layer, self._model, method)
        if problems:
            raise PlanError(listed(problems))
        return found

    def _layer(self, name: str, scheme: str | None) -> LayerPlan | None:
        section = self._section
        if scheme is not None:
            section = section.model_copy(update={"scheme": scheme})
        layer = layer_plan(section, self._model, name, scale_dtype=self._scale_dtype)
        if layer is None or scheme is None:
            return layer
        return replace(layer, asked=None)  # nobody asked: it is one of the choices

    def groups(self) -> list[tuple[str, ...]]:
        """Return the layers to search, those together that must agree."""
        free = [name for name in self._names if not self._pin(name)]
        root = {name: name for name in free}

        def find(name: str) -> str:
            while root[name] != name:
                name = root[name]
            return name

        for bound in self._bound:
            first, *others = [n for n in bound if n in root] or [""]
            for name in others:
                root[find(name)] = find(first)
        groups: dict[str, list[str]] = {}
        for name in free:
            groups.setdefault(find(name), []).append(name)
        found = []
        for group in map(tuple, groups.values()):
            if self._forced(group) == DENSE:
                self.reasons += [f"{n}: dense, as what it is bound to" for n in group]
            else:
                found.append(group)
        return found

    def _forced(self, group: Sequence[str]) -> str | None:
        """Return the scheme of a pinned layer that a unit must agree with, if any."""
        return next((self._pinned_to[n] for n in group if n in self._pinned_to), None)

    @cached_property
    def _pinned_to(self) -> dict[str, str]:
        """Schemes of pinned layers, by each layer that is bound to one."""
        found: dict[str, str] = {}
        for bound in self._bound:
            overrides = [override_of(self._section, n) for n in bound if self._pin(n)]
            for scheme in (x.scheme for x in overrides if x and x.scheme):
                found |= dict.fromkeys(bound, scheme)
        return found

    def coded(
        self,
        groups: Sequence[tuple[str, ...]],
        scheme: str,
        pinned: Mapping[str, LayerPlan],
    ) -> dict[tuple[str, ...], tuple[LayerPlan, ...]]:
        """Return the units that can have a scheme, with their layers' plans.

        A unit that is bound to a pinned layer has that layer's scheme in any case.
        """
        found: dict[tuple[str, ...], tuple[LayerPlan, ...]] = {}
        for group in groups:
            taken = self._forced(group) or scheme
            layers = [x for name in group if (x := self._layer(name, taken))]
            problems = [
                problem
                for layer in layers
                for problem in layer_problems(
                    layer, self._model, self._quantizer(layer.method)
                )
            ]
            if problems:
                self.reasons += problems
            else:
                found[group] = tuple(layers)
        unit_of = {name: group for group in groups for name in group}
        while found:
            plan = _plan(self._model, pinned, found.values())
            refused = self._problems(plan)
            if not refused:
                break
            left_out = {unit_of[n] for n, _ in refused if n in unit_of} & found.keys()
            reasons = [f"{n}: {message}" for n, message in refused]
            if not left_out:
                raise PlanError(listed(reasons))
            self.reasons += reasons
            for group in left_out:
                del found[group]
        return found

    def _problems(self, plan: Plan) -> list[tuple[str, str]]:
        return [
            (problem.where, problem.message)
            for exporter in self._exporters.values()
            for problem in exporter.check(plan, self._model)
        ]

    def require(self, plan: Plan) -> None:
        """Raise unless a plan that mixes all choices can be exported."""
        problems = self._problems(plan)
        if problems:
            raise PlanError(
                "allocate.schemes do not go together:\n"
                + listed([f"{name}: {message}" for name, message in problems])
            )
