"""Codes of one part of a model (a block, or embedding and head), while they are made.

Layers that read the same input and go to the same scheme by the same method are coded
as one matrix, their rows stacked: runtimes fuse them, and some schemes have one scale
for a whole matrix, which then has to be the same for all of them. It is also cheaper:
one factor of the Hessian instead of three.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor
from tqdm import tqdm

from compress.calibration import experts
from compress.core.contracts import Quantizer
from compress.core.families import Linear
from compress.core.plan import LayerPlan
from compress.core.scheme import WHOLE, Scheme
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor
from compress.workdir import LayerRecord, WorkDir


def stacks(
    linears: Sequence[Linear], layers: Mapping[str, LayerPlan]
) -> list[list[LayerPlan]]:
    """Return the layers that are coded together, in order of execution.

    Args:
        linears: Of a block.
        layers: Their plans by path inside the block.
    """
    groups: dict[object, list[LayerPlan]] = {}
    for linear in linears:
        layer = layers[linear.path]
        alike = (linear.input, layer.method, layer.scheme)
        groups.setdefault(alike if _stacks(layer) else layer.name, []).append(layer)
    return list(groups.values())


def _stacks(layer: LayerPlan) -> bool:
    """Whether rows of other layers may lie above and below those of this one."""
    block = layer.scheme.row_block
    if block == WHOLE and layer.scheme.codebook is not None:
        return False  # tables belong to one matrix
    tiles = block == WHOLE or layer.shape[0] % block == 0
    return tiles and not layer.scheme.rank  # a correction is that of one layer


def error_of(
    weight: Tensor, values: Tensor, statistics: LayerStatistics | None
) -> tuple[float | None, float]:
    """Return the relative squared error in the inputs' metric, and plain.

    Args:
        weight: float32 ``[R, C]``.
        values: What it became.
        statistics: Of its input, for ``tr(E H E^T) / tr(W H W^T)``.
    """
    error = weight - values
    plain = float(error.square().sum()) / max(float(weight.square().sum()), 1e-30)
    if statistics is None:
        return None, plain
    hessian = statistics.hessian
    lost = float(((error @ hessian) * error).sum())
    return lost / max(float(((weight @ hessian) * weight).sum()), 1e-30), plain


def _without_statistics(
    quantizer: Quantizer, weight: Tensor, scheme: Scheme, note: str
) -> QuantizedTensor:
    """Return codes that take no account of inputs, with a note why."""
    if scheme.codebook is None:
        return experts.round_to_nearest(weight, scheme, note)
    alike = weight.new_ones(weight.shape[1])
    coded = quantizer.quantize_by_importance(weight, scheme, alike)
    return replace(coded, notes=(*coded.notes, note))


class Part:
    """Codes and records of one part.

    Args:
        quantizers: The methods by name.
        layers: What will be added, to show how far it is.
    """

    def __init__(
        self, quantizers: Mapping[str, Quantizer], layers: Sequence[Sequence[LayerPlan]]
    ) -> None:
        self._quantizers = quantizers
        self.tensors: dict[str, QuantizedTensor] = {}
        self.records: dict[str, LayerRecord] = {}
        total = sum(map(len, layers))
        self._bar = tqdm(total=total, leave=False, unit="layer", disable=None)

    def add(
        self,
        layers: Sequence[LayerPlan],
        weights: Sequence[Tensor],
        statistics: LayerStatistics | None,
        few: str | None = None,
        *,
        importance: Tensor | None = None,
    ) -> list[Tensor]:
        """Quantize layers of one stack; returns the float32 values of each.

        Args:
            layers: All of one method and scheme.
            weights: ``[R, C]`` of each, any float type.
            statistics: Of their input.
            few: Why statistics cannot be used, if so.
            importance: float32 ``[C]`` of the input's columns, instead of statistics.
        """
        self._bar.set_description(layers[0].name)
        quantizer, scheme = self._quantizers[layers[0].method], layers[0].scheme
        used = statistics if quantizer.needs_statistics else None
        stacked = torch.cat([weight.float() for weight in weights])
        started = time.perf_counter()
        if used is not None and few is not None:
            coded = _without_statistics(quantizer, stacked, scheme, few)
        elif importance is not None:
            importance = importance.to(stacked.device)
            coded = quantizer.quantize_by_importance(stacked, scheme, importance)
        else:
            coded = quantizer.quantize(stacked, scheme, used)
        seconds = time.perf_counter() - started
        del stacked
        rows = [len(weight) for weight in weights]
        tokens = None if statistics is None else statistics.tokens
        measured = statistics if tokens else None
        found = []
        for layer, weight, tensor in zip(
            layers, weights, coded.split_rows(rows), strict=True
        ):
            values = tensor.dequantize()
            error, plain = error_of(weight.float(), values, measured)
            share = seconds * len(weight) / sum(rows)
            self.tensors[layer.name] = tensor
            self.records[layer.name] = LayerRecord(error, plain, share, tokens)
            found.append(values)
            self._bar.update()
        return found

    def close(self) -> None:
        """Take the progress bar away."""
        self._bar.close()


class PartWriter:
    """Writes finished parts while the next one is made; leaving waits for the last.

    Args:
        workdir: Where they go.
    """

    def __init__(self, workdir: WorkDir) -> None:
        self._workdir = workdir
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> PartWriter:
        """Return itself."""
        return self

    def save(self, name: str, part: Part) -> None:
        """Write a part, after the one before it is on disk."""
        part.close()
        self.wait()
        self._last = self._pool.submit(
            self._workdir.save_part, name, part.tensors, part.records
        )

    def wait(self) -> None:
        """Return when the last part is on disk."""
        if self._last is not None:
            self._last.result()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for what is being written; an error of the body goes first."""
        self._pool.shutdown()
        if kind is None:
            self.wait()
