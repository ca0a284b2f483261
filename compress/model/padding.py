"""Blocks that differ made alike with neurons and heads that do nothing.

Rows of zeros in gate and up and columns of zeros in down add ``act(0) * 0 = 0``: the
model computes the same, and every loader knows its shape. So does attention whose
matrices and norms are all zeros, where a block has none. It takes the memory and time
of the widest block everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.core.artifact import ModelDescription, TensorInfo, TensorSource
from compress.core.errors import CheckpointError
from compress.core.shapes import (
    attention_flags,
    mlp_widths,
    with_attention,
    with_widths,
)
from compress.core.tensors import TORCH_DTYPES
from compress.model.sources import in_model_order


def padded(
    model: ModelDescription, source: TensorSource, *, multiple: int = 1
) -> tuple[ModelDescription, TensorSource]:
    """Return a model of blocks that are alike, which computes the same.

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
    zeros = _attention(model)
    config = with_attention(model.config, [True] * len(widths))
    config = with_widths(config, [width] * len(widths))
    ordered = in_model_order({**tensors, **zeros}, model.family)
    described = replace(model, config=config, tensors=ordered)
    return described, _PaddedSource(source, pads, zeros)


def _attention(model: ModelDescription) -> dict[str, TensorInfo]:
    """Return the tensors that blocks without attention lack, as block 0 has them."""
    family = model.family
    first = f"{family.block(0)}."
    parts = {
        name.removeprefix(first): info
        for name, info in model.tensors.items()
        if name.startswith(first)
        and family.is_attention(name.removeprefix(first).rpartition(".")[0])
    }
    return {
        f"{family.block(index)}.{name}": info
        for index, attends in enumerate(attention_flags(model.config))
        for name, info in parts.items()
        if not attends
    }


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
    """Another source, with zeros behind some tensors, and tensors of zeros."""

    def __init__(
        self,
        source: TensorSource,
        pads: Mapping[str, _Pad],
        zeros: Mapping[str, TensorInfo],
    ) -> None:
        self._source, self._pads, self._zeros = source, pads, zeros

    def tensors(self) -> Mapping[str, TensorInfo]:
        padded = {
            name: replace(info, shape=self._pads[name].shape(info.shape))
            if name in self._pads
            else info
            for name, info in self._source.tensors().items()
        }
        return {**padded, **self._zeros}

    def read(self, name: str) -> Tensor:
        if name in self._zeros:
            info = self._zeros[name]
            return torch.zeros(info.shape, dtype=TORCH_DTYPES[info.dtype])
        tensor = self._source.read(name)
        return self._pads[name](tensor) if name in self._pads else tensor
