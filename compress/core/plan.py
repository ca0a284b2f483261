"""Plan: which scheme and method each matrix gets. Pure data, JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.core.errors import PlanError
from compress.core.foreign import MALFORMED, parse_json
from compress.core.scheme import Scheme

PLAN_VERSION = 1


@dataclass(frozen=True)
class LayerPlan:
    """The decision for one matrix.

    Attributes:
        name: Module name in the checkpoint, without ``.weight``.
        shape: Rows (outputs) and columns (inputs).
        method: Name of the quantizer.
        scheme: What it quantizes to.
        asked: Name of the scheme that was asked for, where rows of this length cannot
            be held in it and ``scheme`` stands in.
    """

    name: str
    shape: tuple[int, int]
    method: str
    scheme: Scheme
    asked: str | None = None


@dataclass(frozen=True)
class Plan:
    """All decisions. A matrix that has no entry stays as it is.

    Attributes:
        model: Where the model came from, for the reader.
        layers: By module name, in model order.
    """

    model: str
    layers: Mapping[str, LayerPlan]

    def to_json(self) -> str:
        """Return the plan as text that people can read and edit."""
        layers = {
            name: {
                "shape": list(layer.shape),
                "method": layer.method,
                "scheme": layer.scheme.to_dict(),
                **({"asked": layer.asked} if layer.asked else {}),
            }
            for name, layer in self.layers.items()
        }
        data = {"version": PLAN_VERSION, "model": self.model, "layers": layers}
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that :meth:`to_json` wrote.

        Raises:
            PlanError: The text is no plan.
        """
        try:
            data: dict[str, Any] = parse_json(text)
            if data["version"] != PLAN_VERSION:
                raise PlanError(f"plan version {data['version']}; expected 1")
            layers = {
                name: LayerPlan(
                    name,
                    (int(entry["shape"][0]), int(entry["shape"][1])),
                    str(entry["method"]),
                    Scheme.from_dict(entry["scheme"]),
                    entry.get("asked"),
                )
                for name, entry in data["layers"].items()
            }
            return cls(str(data["model"]), layers)
        except MALFORMED as error:
            raise PlanError(f"not a plan: {type(error).__name__}: {error}") from error
