"""The bytes of each tensor of a GGUF file, in the order of the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.core.artifact import CompressedModel
from compress.core.tensors import QuantizedTensor
from compress.export.gguf_blocks import Bytes, encode_dense, pack_blocks
from compress.export.gguf_float_blocks import scale_bytes
from compress.export.gguf_layout import Placement
from compress.export.gguf_metadata import rope_divisors
from compress.export.gguf_names import to_gguf_rows
from compress.export.gguf_reader import GGUFFile


def tensor_data(
    artifact: CompressedModel,
    placements: tuple[Placement, ...],
    template: GGUFFile | None,
) -> Iterator[Bytes]:
    """Yield the bytes of each placement, one in memory at a time.

    Args:
        artifact: What is written.
        placements: In file order.
        template: Holds what the plan has no codes for, if there is one.
    """
    for placement in placements:
        if placement.scales:
            yield scale_bytes([artifact.quantized(name) for name in placement.scales])
        elif placement.stack:
            yield _stack_bytes(artifact, placement)
        elif placement.layer is not None:
            yield _layer_bytes(artifact.quantized(placement.layer), placement)
        elif template is not None:
            stored = template.tensors[placement.target]
            if stored.type == placement.type:
                yield template.read(placement.target)
            else:
                values = torch.from_numpy(template.read_values(placement.target))
                yield encode_dense(values, placement.type, name=placement.target)
        elif placement.source is None:
            divisors = rope_divisors(artifact.description.config)
            assert divisors is not None, "only rope_freqs.weight has no source"
            yield encode_dense(divisors, placement.type, name=placement.target)
        else:
            weight = to_gguf_rows(
                artifact.source.read(placement.source), placement.heads
            )
            yield encode_dense(weight, placement.type, name=placement.source)


def _stack_bytes(artifact: CompressedModel, placement: Placement) -> Bytes:
    """Return the experts of a block one after another, each read when it is due."""
    experts, rows, _ = placement.shape
    data = np.empty((experts * rows, placement.size_bytes // (experts * rows)), "u1")
    for number, layer in enumerate(placement.stack):
        if placement.layer is not None:
            part = _layer_bytes(artifact.quantized(layer), placement)
        else:
            weight = artifact.source.read(f"{layer}.weight")
            part = encode_dense(weight, placement.type, name=f"{layer}.weight")
        data[number * rows : (number + 1) * rows] = part
    return data


def _layer_bytes(quantized: QuantizedTensor, placement: Placement) -> Bytes:
    moved = with_rows(quantized, partial(to_gguf_rows, heads=placement.heads))
    if placement.is_exact:
        return pack_blocks(moved)
    return encode_dense(moved.dequantize(), placement.type, name=str(placement.layer))


def with_rows(
    tensor: QuantizedTensor, order: Callable[[Tensor], Tensor]
) -> QuantizedTensor:
    """Return a coded matrix with its rows in another order."""
    names = ("codes", "scale", "zero", "outer")
    parts = {name: getattr(tensor, name) for name in names}
    moved: dict[str, Any] = {
        name: order(part)
        for name, part in parts.items()
        if part is not None and part.dim() > 1  # one number is of all rows
    }
    return replace(tensor, **moved)
