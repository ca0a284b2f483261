"""What a search gives: a plan, and an account of it for reports and terminals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from compress.core.allocation import Allocation, AllocationProblem
from compress.core.plan import Plan
from compress.report.terminal import allocation_text


@dataclass(frozen=True)
class Outcome:
    """A plan that was searched, and the report's account of it.

    Attributes:
        plan: The decisions.
        record: ``allocation`` of ``report.json``, described in ``docs/report.md``.
    """

    plan: Plan
    record: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"plan": json.loads(self.plan.to_json()), "allocation": self.record}

    def text(self) -> str:
        """Return tables for a terminal: budget, schemes, and each unit."""
        return allocation_text(self.plan.model, self.record)


def account(problem: AllocationProblem, found: Allocation) -> dict[str, Any]:
    """Return plain data on an allocation and all that it was chosen from."""
    return {
        "assignment": list(found.assignment),
        "objective": found.objective,
        "predicted_kl": problem.predicted_loss(found.assignment),
        "evaluations": found.evaluations,
        "history": [asdict(step) for step in found.history],
        "units": [
            {
                "layers": list(unit.layers),
                "weights": unit.weights,
                "chosen": index,
                "choices": [
                    {
                        "scheme": choice.scheme.name,
                        "bytes": choice.bytes,
                        "error": choice.error,
                        "loss": choice.loss,
                    }
                    for choice in unit.choices
                ],
            }
            for unit, index in zip(problem.units, found.assignment, strict=True)
        ],
    }
