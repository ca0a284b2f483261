"""MLPs of different widths made equally wide with neurons that do nothing.

Rows of zeros in gate and up and columns of zeros in down add ``act(0) * 0 = 0``: the
model computes the same, and every loader knows its shape. It takes the memory and time
of the widest block everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.core.artifact import ModelDescription, TensorInfo, TensorSource
from compress.core.errors import CheckpointError
from compress.core.shapes import mlp_widths, with_widths


def padded(
    model: ModelDescription, source: TensorSource, *, multiple: int = 1
) -> tuple[ModelDescription, TensorSource]:
    """Return a model of equally wide blocks that computes the same.

    Args:
        model: Of a family whose MLP is dense.
        source: Its tensors.
        multiple: The width is the largest one, rounded up to a multiple of this.

    Raises:
        CheckpointError: The family is a mixture of experts, or its config is wrong.
    """
    widths = mlp_widths(model.config)
    width = -(-max(widths) // multiple) * multiple
    pads = _pads(model, [width - own for own in widths])
    tensors = {
        name: replace(info, shape=pads[name].shape(info.shape))
        if name in pads
        else info
        for name, info in model.tensors.items()
    }
    config = with_widths(model.config, [width] * len(widths))
    described = replace(model, config=config, tensors=tensors)
    return described, _PaddedSource(source, pads)


@dataclass(frozen=True)
class _Pad:
    """Zeros behind each of some equal parts of an axis: 0 is rows, 1 is columns."""

    axis: int
    parts: int
    zeros: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        more = self.parts * self.zeros
        return tuple(x + more * (n == self.axis) for n, x in enumerate(shape))

    def __call__(self, tensor: Tensor) -> Tensor:
        behind = [0, 0] * (tensor.dim() - 1 - self.axis) + [0, self.zeros]
        parts = torch.chunk(tensor, self.parts, self.axis)
        filled = [nn.functional.pad(part, behind) for part in parts]
        return torch.cat(filled, self.axis)


def _pads(model: ModelDescription, zeros: list[int]) -> dict[str, _Pad]:
    """Return what is done to each tensor that changes."""
    groups = [group for group in model.family.slice_groups if group.unit == "neuron"]
    if not groups:
        raise CheckpointError(
            f"{model.label}: a mixture of experts has no MLP of one width for a block"
        )
    found = {}
    for index, count in enumerate(zeros):
        block = model.family.block(index)
        for group in groups:
            parts = 2 if group.layout == "halves" else 1
            for path in group.rows:
                for kind in ("weight", "bias"):
                    found[f"{block}.{path}.{kind}"] = _Pad(0, parts, count)
            for path in group.columns:
                found[f"{block}.{path}.weight"] = _Pad(1, 1, count)
    return {n: pad for n, pad in found.items() if pad.zeros and n in model.tensors}


class _PaddedSource(TensorSource):
    """Another source, with zeros behind some tensors."""

    def __init__(self, source: TensorSource, pads: Mapping[str, _Pad]) -> None:
        self._source, self._pads = source, pads

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            name: replace(info, shape=self._pads[name].shape(info.shape))
            if name in self._pads
            else info
            for name, info in self._source.tensors().items()
        }

    def read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        return self._pads[name](tensor) if name in self._pads else tensor
