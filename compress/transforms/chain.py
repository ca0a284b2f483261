"""The transforms of a run, one after the other, with a checkpoint after each."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from compress.core.artifact import ModelDescription, TensorSource
from compress.core.errors import PlanError
from compress.core.plan import Plan
from compress.distributed.team import Team
from compress.transforms.catalog import plain_options
from compress.transforms.contract import Scaling, Structural, Transform
from compress.transforms.measure import decide, step_of
from compress.transforms.source import TransformedSource, untied
from compress.workdir import WorkDir

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Transformed:
    """A model after its transforms.

    Attributes:
        source: Its tensors.
        reports: Name, options and decisions of each transform.
    """

    source: TransformedSource
    reports: list[dict[str, Any]]


@dataclass(frozen=True)
class Chain:
    """Transforms in the order in which they apply; may be empty."""

    transforms: tuple[Transform, ...]

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration text has to run through the dense model."""
        return any(isinstance(transform, Scaling) for transform in self.transforms)

    def identity(self) -> list[Any]:
        """Return plain data that decides what the chain does."""
        return [[t.name, plain_options(t)] for t in self.transforms]

    def describe(self, model: ModelDescription) -> ModelDescription:
        """Return the description of the model after the transforms; reads no weight.

        Raises:
            PlanError: A transform cannot treat this model; with all reasons.
        """
        problems = []
        for transform in self.transforms:
            reason = transform.problem(model)
            if model.family.experts is not None:
                reason = (
                    f"{model.family.name} is a mixture of experts, whose router reads "
                    "what the experts read; transforms are for dense models"
                )
            if reason:
                problems.append(f"transforms: {transform.name}: {reason}")
        if problems:
            raise PlanError("\n".join(problems))
        if any(transform.unties for transform in self.transforms):
            model = untied(model)
        names = tuple(transform.name for transform in self.transforms)
        return replace(model, transforms=(*model.transforms, *names))

    def run(
        self,
        model: ModelDescription,
        source: TensorSource,
        plan: Plan,
        *,
        windows: Tensor | None,
        workdir: WorkDir,
        device: str,
        team: Team | None = None,
    ) -> Transformed:
        """Return the transformed model; what was measured is kept in ``workdir``.

        Args:
            model: From :meth:`describe`.
            source: Tensors of the original.
            plan: Layers that will be coded, and their schemes.
            windows: int64 ``[N, T]``, if :attr:`needs_inputs`.
            workdir: Scales that are there are not searched again.
            device: Where blocks run.
            team: The processes that measure together.
        """
        team = team or Team()
        exact = frozenset(f"{name}.weight" for name in plan.layers)
        current = TransformedSource(source, model.dtype, exact=exact)
        scales, records = team.alone(workdir.read_transforms)
        reports = []
        for index, transform in enumerate(self.transforms):
            entry = {"name": transform.name, "options": plain_options(transform)}
            if isinstance(transform, Structural):
                current = current.then(transform.step(model, current))
                reports.append({**entry, "places": []})
                continue
            assert isinstance(transform, Scaling) and windows is not None
            label = f"{index} {transform.name}"
            if label not in records:
                decision = decide(
                    transform,
                    model,
                    current,
                    plan,
                    windows=windows,
                    device=device,
                    team=team,
                )
                prefixed = {f"{label} {k}": v for k, v in decision.scales.items()}
                scales = {**scales, **prefixed}
                records = {**records, label: decision.records}
                workdir.save_transforms(scales, records)
            own = {
                name.removeprefix(f"{label} "): scale
                for name, scale in scales.items()
                if name.startswith(f"{label} ")
            }
            places = records[label]
            changed = sum(1 for place in places if place["changed"])
            _log.info("%s: %d of %d places", transform.name, changed, len(places))
            current = current.then(step_of(transform, model, own))
            reports.append({**entry, "places": places})
        return Transformed(current, reports)
