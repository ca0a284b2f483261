"""The transforms by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.transforms.awq import AWQ
from compress.transforms.contract import Scaling, Transform
from compress.transforms.rotation import Rotation
from compress.transforms.scale_folding import ScaleFolding
from compress.transforms.smoothquant import SmoothQuant

_CLASSES: tuple[type[Transform], ...] = (Rotation, ScaleFolding, SmoothQuant, AWQ)

TRANSFORMS: Mapping[str, type[Transform]] = {kind.name: kind for kind in _CLASSES}
"""Every transform, in an order in which they can follow one another."""


def order_problem(names: Sequence[str]) -> tuple[int, str] | None:
    """Return which of the transforms cannot stand where it does, and why."""
    for index, name in enumerate(names):
        if name in names[:index]:
            return index, f"{name!r} is listed twice; one of them is enough"
        scaled = [
            other for other in names[:index] if issubclass(TRANSFORMS[other], Scaling)
        ]
        if name == Rotation.name and scaled:
            return index, (
                f"a rotation mixes the channels that {scaled[0]} has scaled, and "
                f"undoes it; list {name} before {scaled[0]}"
            )
    return None


def plain_options(transform: Transform) -> dict[str, Any]:
    """Return a transform's options as plain data."""
    return transform.options.model_dump(mode="json")
