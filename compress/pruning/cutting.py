"""What becomes of one MLP, or one attention, once its inputs are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compress.core.artifact import TensorSource
from compress.core.contracts import Pruner
from compress.core.neurons import GatedMLP, NeuronStatistics, loudest
from compress.core.tensors import TORCH_DTYPES
from compress.pruning.gradients import Gradients
from compress.pruning.heads import (
    AttentionPlace,
    choose_by_weight,
    choose_groups,
    cut_groups,
)
from compress.pruning.places import MLPPlace
from compress.pruning.repair import repaired, repaired_columns
from compress.pruning.statistics import NeuronMoments, unseen
from compress.pruning.surgery import cut_rows

if TYPE_CHECKING:
    from compress.pruning.stage import Pruning

Place = MLPPlace | AttentionPlace


@dataclass(frozen=True)
class Cut:
    """What becomes of one place.

    Attributes:
        place: An MLP or an attention.
        kept: Its neurons or groups that stay.
        tensors: Those of the place, or more.
        error: See :class:`~compress.pruning.repair.Repaired`.
        unseen: Whether too few tokens came to it.
    """

    place: Place
    kept: Tensor
    tensors: Mapping[str, Tensor]
    error: float | None = None
    unseen: bool = False

    def replace_(self, block: nn.Module) -> None:
        """Let a loaded block compute what is left, in the shapes that it has."""
        layer = block.get_submodule(self.place.down_path)
        weight = layer.get_parameter("weight")
        weight.data = self.filled(weight)
        bias = self.tensors.get(f"{self.place.down}.bias")
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(weight), requires_grad=False)

    def filled(self, weight: Tensor) -> Tensor:
        """Return ``down`` or o in the shape of ``weight``, zeros for what is gone."""
        left = torch.zeros_like(weight)
        columns = self.place.columns(self.kept.to(weight.device))
        left[:, columns] = self.tensors[f"{self.place.down}.weight"].to(weight)
        return left


class Cutter:
    """Cuts the places of a model.

    Args:
        pruning: What is to be done.
        source: Tensors of the model without the dropped blocks.
        widths: Neurons that each block keeps.
        gradients: By path of the MLP, if they were taken.
        chosen: The neurons that each block keeps, if that is decided.
    """

    def __init__(
        self,
        pruning: Pruning,
        source: TensorSource,
        *,
        widths: Sequence[int],
        gradients: Mapping[str, Gradients],
        chosen: Sequence[Sequence[int]] = (),
    ) -> None:
        self._pruning, self._source = pruning, source
        self._chosen = chosen
        self._widths, self._gradients = widths, gradients

    def cut(
        self,
        places: Sequence[Place],
        moments: Mapping[str, NeuronMoments],
    ) -> list[Cut]:
        """Cut some places of a block; without moments, by weights alone."""
        cuts = []
        for place in places:
            found = self._statistics(place, moments.get(place.path))
            if isinstance(place, AttentionPlace):
                tensors, kept, error = self._cut_heads(place, found)
            else:
                tensors, kept, error = self._cut_neurons(place, found)
            unseen_ = bool(moments) and found is None
            cuts.append(Cut(place, kept, tensors, error, unseen_))
        return cuts

    def _statistics(
        self, place: Place, moments: NeuronMoments | None
    ) -> NeuronStatistics | None:
        """Return what was measured of a place, if that is enough."""
        if moments is None:
            return None
        if isinstance(place, AttentionPlace):
            return moments.result(place.down, None)
        if place.expert is not None and moments.tokens < place.neurons:
            return None
        effect = self._gradients.get(place.path)
        return moments.result(place.down, effect.effect if effect else None)

    def _cut_heads(
        self, place: AttentionPlace, found: NeuronStatistics | None
    ) -> tuple[dict[str, Tensor], Tensor, float | None]:
        """Return the tensors of an attention, which groups stay, and the error."""
        pruning, source = self._pruning, self._source
        weight = source.read(f"{place.down}.weight").to(pruning.device).float()
        keep, repair = pruning.kv_groups, pruning.repair if found else "none"
        if found is None:
            values = place.values(source.read).to(weight)
            kept = choose_by_weight(place, weight, values, keep)
        else:
            kept = choose_groups(place, weight, found, keep)
        columns = place.columns(kept)
        result = repaired_columns(weight, found, columns, repair=repair)
        tensors = cut_groups(place, source, kept)
        tensors[f"{place.down}.weight"] = result.down.to(self._dtype(place.down))
        return tensors, kept, result.error

    def _dtype(self, layer: str) -> torch.dtype:
        return TORCH_DTYPES[self._source.tensors()[f"{layer}.weight"].dtype]

    def _cut_neurons(
        self, place: MLPPlace, found: NeuronStatistics | None
    ) -> tuple[dict[str, Tensor], Tensor, float | None]:
        """Return the tensors of one MLP, which neurons stay, and the error."""
        pruning, dtype = self._pruning, self._dtype(place.down)
        mlp = place.read(lambda name: self._source.read(name).to(pruning.device))
        if self._chosen:
            kept = torch.tensor(self._chosen[place.block], device=mlp.down.device)
        else:
            kept = choose(pruning.pruner, mlp, found, self._widths[place.block])
        repair = pruning.repair if found is not None else "none"
        result = repaired(mlp, found, kept, repair)
        tensors = cut_rows(place, self._source, kept)
        tensors[f"{place.down}.weight"] = result.down.to(dtype)
        if pruning.repair == "bias":
            for name in (*place.rows, place.down):  # the config knows all or none
                rows = len(tensors[f"{name}.weight"])
                tensors.setdefault(f"{name}.bias", torch.zeros(rows, dtype=dtype))
            own = f"{place.down}.bias"
            if own in self._source.tensors():
                tensors[own] = self._source.read(own)
            if result.bias is not None:
                tensors[own] = (tensors[own].to(result.bias) + result.bias).to(dtype)
        return tensors, kept, result.error


def choose(
    pruner: Pruner, mlp: GatedMLP, found: NeuronStatistics | None, width: int
) -> Tensor:
    """Return the neurons that stay; without statistics, by weights alone."""
    if width == mlp.neurons:
        return torch.arange(width, device=mlp.down.device)
    if not pruner.needs_activations:
        protected = None if found is None else loudest(found)
        return pruner.select(mlp, None, width, protected)
    if found is None:
        return pruner.select(mlp, unseen(mlp), width)
    return pruner.select(mlp, found, width, loudest(found))
