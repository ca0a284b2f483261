"""Choosing channel scales: one pass of the dense model, a block at a time.

Inputs of the layers are summed up while a block runs in batches; when it has run, its
scales are chosen and only these are kept. A second moment of each input lives as long
as its block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.collect import Moments
from compress.core.artifact import ModelDescription, TensorSource
from compress.core.errors import CalibrationError
from compress.core.plan import Plan
from compress.core.tensors import TORCH_DTYPES
from compress.distributed.team import Team
from compress.model.streaming import StreamedModel
from compress.progress import progress_bar
from compress.transforms.contract import Choice, Inputs, Reader, Scaling
from compress.transforms.operations import Operation, Step
from compress.transforms.places import Place, fold, places_of, storable


@dataclass(frozen=True)
class Decision:
    """The scales of a whole model.

    Attributes:
        scales: float32 ``[channels]`` by :func:`key`; places left alone have none.
        records: What was decided for each place, for the report.
    """

    scales: Mapping[str, Tensor]
    records: list[dict[str, Any]]


def key(block: str, place: Place) -> str:
    """Return the name of a place in a whole model."""
    return f"{block}.{place.before}:{place.kind}"


def decide(
    transform: Scaling,
    model: ModelDescription,
    source: TensorSource,
    plan: Plan,
    *,
    windows: Tensor,
    device: str,
    team: Team,
) -> Decision:
    """Run the dense model once and let a transform choose its scales.

    Args:
        transform: What chooses.
        model: As ``source`` has it.
        source: Tensors after the transforms before this one.
        plan: Which layers are rounded to what.
        windows: int64 ``[N, T]`` calibration tokens.
        device: Where blocks run and the search is done.
        team: The processes. Each runs its share of the windows, and searches at its
            share of the places.

    Raises:
        CalibrationError: Inputs are not finite.
    """
    streamed = StreamedModel(model, source, device=device)
    states = streamed.embed(team.share(windows))
    scales: dict[str, Tensor] = {}
    records: list[dict[str, Any]] = []
    bar = progress_bar(range(model.block_count), desc=transform.name, unit="block")
    for index in bar:
        path = model.family.block(index)
        places = places_of(model, transform.kinds, index)
        with streamed.block(index) as block, torch.no_grad():
            sums = {p.readers[0]: _Sums(transform.needs_hessian) for p in places}
            watch = {reader: entry.add for reader, entry in sums.items()}
            states.hidden = streamed.run_block(index, states, watch=watch)
            chosen: dict[str, Choice] = {}
            for number, place in enumerate(places):
                first, owner = f"{path}.{place.readers[0]}", number % team.size
                inputs = sums.pop(place.readers[0]).result(first, team, owner)
                if inputs is not None:
                    readers = _readers(block, path, place, plan)
                    chosen[key(path, place)] = transform.choose(place, inputs, readers)
            found = _of_all(team, chosen, streamed.device)
            for place in places:
                choice = found[key(path, place)]
                scale = choice.scale
                if scale is not None and place.kind == "norm":
                    scale = storable(
                        scale,
                        block.get_submodule(place.before).get_parameter("weight"),
                        offset=model.family.norm_offset,
                        dtype=TORCH_DTYPES[model.dtype],
                    )
                if scale is not None:
                    scales[key(path, place)] = scale.cpu().contiguous()
                facts = {"place": key(path, place), "kind": place.kind, "block": index}
                changed = scale is not None
                records.append({**facts, "changed": changed, **choice.facts})
    return Decision(scales, records)


def step_of(
    transform: Scaling, model: ModelDescription, scales: Mapping[str, Tensor]
) -> Step:
    """Return what scales do to the tensors of a model."""
    operations: dict[str, list[Operation]] = {}
    for index in range(model.block_count):
        path = model.family.block(index)
        for place in places_of(model, transform.kinds, index):
            scale = scales.get(key(path, place))
            if scale is not None:
                for name, operation in fold(place, scale, path, model).items():
                    operations.setdefault(name, []).append(operation)
    return Step(operations)


def _of_all(
    team: Team, chosen: Mapping[str, Choice], device: torch.device
) -> dict[str, Choice]:
    """Return the choices of all processes, by place."""
    scales = {k: c.scale for k, c in chosen.items() if c.scale is not None}
    facts = {name: choice.facts for name, choice in chosen.items()}
    return {
        name: Choice(given.get(name), said)
        for given, about in team.exchange(scales, facts, device)
        for name, said in about.items()
    }


def _readers(block: nn.Module, path: str, place: Place, plan: Plan) -> list[Reader]:
    found = []
    for reader in place.readers:
        layer = plan.layers.get(f"{path}.{reader}")
        weight = block.get_submodule(reader).get_parameter("weight").detach().float()
        found.append(Reader(weight, layer.scheme if layer else None))
    return found


class _Sums:
    """Sums over the tokens that a layer is fed."""

    def __init__(self, with_hessian: bool) -> None:
        self._tokens = 0
        self._total: Tensor | None = None
        self._largest: Tensor | None = None
        self._moments = Moments() if with_hessian else None

    def add(self, inputs: Tensor) -> None:
        """Take the inputs ``[B, T, C]`` of one call into account."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        size = flat.abs()
        total, largest = size.sum(0, dtype=torch.float64), size.amax(0)
        self._tokens += len(flat)
        if self._total is None or self._largest is None:
            self._total, self._largest = total, largest
        else:
            self._total += total
            self._largest = torch.maximum(self._largest, largest)
        if self._moments is not None:
            self._moments.add(inputs.detach().float())

    def result(self, layer: str, team: Team, owner: int) -> Inputs | None:
        """Return what all processes measured together; ``None`` but for the owner.

        Raises:
            CalibrationError: The inputs are not finite, or there were none.
        """
        assert self._total is not None and self._largest is not None
        team.add_([self._total], owner=owner)
        team.largest_(self._largest)
        self._tokens = sum(team.gather(self._tokens))
        if self._moments is not None:
            self._moments.join_(team, owner=owner)
        if team.rank != owner:
            return None
        if not bool(torch.isfinite(self._total).all()):
            raise CalibrationError(
                f"inputs of {layer} are NaN or infinite; the checkpoint is damaged, or "
                "its activations do not fit the arithmetic"
            )
        mean = (self._total / self._tokens).float()
        hessian = None
        if self._moments is not None:
            hessian = self._moments.statistics(layer).hessian
        return Inputs(mean, self._largest, hessian)
