"""Carrying out a plan, one decoder block at a time, with a checkpoint after each.

With a calibrated method, hidden states of the calibration windows travel through the
blocks: those of the compressed model, and beside them those of the dense one where a
method corrects for drift. Without one, layers are read and coded one by one and nothing
is ever run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from compress.calibration import experts
from compress.calibration.collect import first_arrivals, measure
from compress.core.artifact import ModelDescription, TensorInfo, TensorSource
from compress.core.contracts import Quantizer
from compress.core.families import Linear
from compress.core.plan import LayerPlan, Plan
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor
from compress.model.sources import check_finite
from compress.model.streaming import Activations, StreamedModel
from compress.workdir import LayerRecord, WorkDir

EMBEDDINGS = "embeddings"
"""Name of the part that holds codes of embedding and head."""


def part_of_layer(layer: str, model: ModelDescription) -> str:
    """Return the checkpoint part that a layer's codes are in."""
    prefix = f"{model.family.blocks}."
    if not layer.startswith(prefix):
        return EMBEDDINGS
    return f"{int(layer.removeprefix(prefix).partition('.')[0]):04d}"


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


class CompressedSource(TensorSource):
    """Dense tensors of a model, with the plan's layers decoded from their codes."""

    def __init__(
        self,
        source: TensorSource,
        plan: Plan,
        quantized: Callable[[str], QuantizedTensor],
    ) -> None:
        self._source, self._plan, self._quantized = source, plan, quantized

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Describe the tensors of the dense model."""
        return self._source.tensors()

    def read(self, name: str) -> Tensor:
        """Return a tensor; float32 where it comes from codes."""
        layer = name.removesuffix(".weight")
        if layer != name and layer in self._plan.layers:
            return self._quantized(layer).dequantize()
        return self._source.read(name)


@dataclass
class PlanRunner:
    """Quantizes every layer of a plan into a work directory.

    Attributes:
        description: The model.
        source: Its dense tensors.
        plan: What each layer becomes.
        quantizers: The methods of the plan, by name.
        workdir: Where codes go; parts that are there are not computed again.
        device: Where blocks run and layers are solved.
        propagate: Whether later blocks see compressed outputs (``quantized``) or those
            of the dense model (``fp``).
    """

    description: ModelDescription
    source: TensorSource
    plan: Plan
    quantizers: Mapping[str, Quantizer]
    workdir: WorkDir
    device: str = "cpu"
    propagate: str = "quantized"

    @property
    def needs_calibration(self) -> bool:
        """Whether a layer inside a block has a method that needs statistics."""
        inside = set(self.description.linears())
        return any(
            self.quantizers[layer.method].needs_statistics
            for layer in self.plan.layers.values()
            if layer.name in inside
        )

    @property
    def needs_drift(self) -> bool:
        """Whether the dense model has to run beside the compressed one."""
        methods = {layer.method for layer in self.plan.layers.values()}
        return self.propagate == "quantized" and any(
            self.quantizers[m].needs_statistics and self.quantizers[m].needs_drift
            for m in methods
        )

    def run(self, windows: Tensor | None) -> None:
        """Quantize all that is not in the work directory yet.

        Args:
            windows: int64 ``[N, T]`` calibration tokens, if :attr:`needs_calibration`.
        """
        outside = [
            layer
            for layer in self.plan.layers.values()
            if part_of_layer(layer.name, self.description) == EMBEDDINGS
        ]
        if outside and not self.workdir.has_part(EMBEDDINGS):
            part = _Part(self, outside)
            for layer in outside:
                part.add(layer, self._read(layer), None)
            part.save(EMBEDDINGS)
        if windows is None:
            self._run_without_data()
        else:
            self._run_with_data(windows)

    def _read(self, layer: LayerPlan) -> Tensor:
        weight = self.source.read(f"{layer.name}.weight")
        check_finite(weight, f"{layer.name}.weight")
        return weight.to(self.device, torch.float32)

    def _layers(self, index: int) -> dict[str, LayerPlan]:
        """Return the plan of one block by path inside the block."""
        prefix = f"{self.description.family.block(index)}."
        return {
            linear.path: self.plan.layers[prefix + linear.path]
            for linear in self.description.block_linears(index)
            if prefix + linear.path in self.plan.layers
        }

    def _blocks(self) -> tqdm[int]:
        count = self.description.block_count
        return tqdm(range(count), desc="blocks", unit="block", disable=None)

    def _run_without_data(self) -> None:
        for index in self._blocks():
            layers = self._layers(index)
            if not layers or self.workdir.has_part(f"{index:04d}"):
                continue
            part = _Part(self, list(layers.values()))
            for layer in layers.values():
                part.add(layer, self._read(layer), None)
            part.save(f"{index:04d}")

    def _run_with_data(self, windows: Tensor) -> None:
        model = StreamedModel(self.description, self.source, device=self.device)
        states = model.embed(windows)
        dense = None
        if self.needs_drift:
            dense = Activations(states.hidden.clone(), states.calls)
        for index in self._blocks():
            with model.block(index) as block:
                self._run_block(model, index, block, states, dense)

    def _run_block(
        self,
        model: StreamedModel,
        index: int,
        block: nn.Module,
        states: Activations,
        dense: Activations | None,
    ) -> None:
        layers, name = self._layers(index), f"{index:04d}"
        linears = [x for x in self.description.block_linears(index) if x.path in layers]
        names = self.description.family.experts
        done = self.workdir.has_part(name) or not layers
        kept: dict[str, list[Tensor]] = {}
        routed: list[Tensor] = []
        if dense is not None:
            keep = {} if done else _keep_inputs(linears, kept)
            keep |= {} if done else experts.keep_states(linears, names, routed)
            dense.hidden = model.run_block(index, dense, watch=keep)
        if done:
            if self.propagate == "quantized":
                for path, layer in layers.items():
                    codes = self.workdir.read_layer(name, layer.name)
                    _replace(block, path, codes.dequantize())
            states.hidden = model.run_block(index, states, at_once=True)
            return
        part = _Part(self, list(layers.values()))
        dense_experts = experts.dense_experts(block, names, routed)

        def arrive(shared: str, inputs: Tensor) -> None:
            readers = [linear for linear in linears if linear.input == shared]
            before = torch.cat(kept.pop(shared)) if shared in kept else None
            if dense_experts is not None and readers[0].expert is not None:
                before = dense_experts.inputs(readers[0])
            first = layers[readers[0].path].name
            statistics = measure(inputs, before, first)
            few = experts.few_tokens(readers[0], statistics)
            for linear in readers:
                layer = layers[linear.path]
                weight = block.get_submodule(linear.path).get_parameter("weight")
                values = part.add(layer, weight.detach(), statistics, few)
                if self.propagate == "quantized":
                    _replace(block, linear.path, values)

        watch = first_arrivals(linears, arrive)
        states.hidden = model.run_block(index, states, watch=watch, at_once=True)
        part.save(name)


def _keep_inputs(
    linears: list[Linear], kept: dict[str, list[Tensor]]
) -> dict[str, Callable[[Tensor], None]]:
    """Return hooks that keep the dense inputs, once for each shared one."""
    shared = [linear for linear in linears if linear.expert is None]
    first = {linear.input: linear.path for linear in reversed(shared)}
    return {path: kept.setdefault(shared, []).append for shared, path in first.items()}


def _replace(block: nn.Module, path: str, values: Tensor) -> None:
    weight = block.get_submodule(path).get_parameter("weight")
    weight.data = values.to(weight)


class _Part:
    """Codes and records of one part while they are made."""

    def __init__(self, runner: PlanRunner, layers: list[LayerPlan]) -> None:
        self._runner = runner
        self._tensors: dict[str, QuantizedTensor] = {}
        self._records: dict[str, LayerRecord] = {}
        self._bar = tqdm(total=len(layers), leave=False, unit="layer", disable=None)

    def add(
        self,
        layer: LayerPlan,
        weight: Tensor,
        statistics: LayerStatistics | None,
        few: str | None = None,
    ) -> Tensor:
        """Quantize one layer; returns its values in float32.

        ``few`` says why its statistics cannot be used, if so.
        """
        self._bar.set_description(layer.name)
        quantizer = self._runner.quantizers[layer.method]
        started = time.perf_counter()
        used = statistics if quantizer.needs_statistics else None
        if used is not None and few is not None:
            result = experts.round_to_nearest(weight, layer.scheme, few)
        else:
            result = quantizer.quantize(weight, layer.scheme, used)
        seconds = time.perf_counter() - started
        values = result.dequantize()
        tokens = None if statistics is None else statistics.tokens
        error, plain = error_of(weight.float(), values, statistics if tokens else None)
        self._tensors[layer.name] = result
        self._records[layer.name] = LayerRecord(error, plain, seconds, tokens)
        self._bar.update()
        return values

    def save(self, name: str) -> None:
        """Write the checkpoint of this part."""
        self._bar.close()
        self._runner.workdir.save_part(name, self._tensors, self._records)
