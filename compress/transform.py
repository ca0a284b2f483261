"""Carrying out a plan, one decoder block at a time, with a checkpoint after each.

With a calibrated method, hidden states of the calibration windows travel through the
blocks: those of the compressed model, and beside them those of the dense one where a
method corrects for drift. Without one, layers are read and coded one by one and nothing
is ever run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from compress.block_tuning import tune_block
from compress.calibration import ends, experts
from compress.calibration.collect import Moments
from compress.calibration.walk import BlockWalk
from compress.core.artifact import ModelDescription, TensorInfo, TensorSource
from compress.core.contracts import Quantizer
from compress.core.families import Linear
from compress.core.plan import LayerPlan, Plan
from compress.core.scales import TORCH_DTYPES
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor
from compress.model.prefetch import ReadAhead
from compress.model.sources import check_finite
from compress.model.spill import Room
from compress.model.states import Activations
from compress.model.streaming import StreamedModel
from compress.parts import Part, PartWriter, stacks
from compress.workdir import WorkDir

EMBEDDINGS, HEAD = "embeddings", "head"
"""Names of the parts of the embedding, be it tied or not, and of a head beside it."""


def block_of_layer(layer: str, model: ModelDescription) -> int | None:
    """Return the number of a layer's block; ``None`` for embedding and head."""
    prefix = f"{model.family.blocks}."
    if not layer.startswith(prefix):
        return None
    return int(layer.removeprefix(prefix).partition(".")[0])


def part_of_layer(layer: str, model: ModelDescription) -> str:
    """Return the checkpoint part that a layer's codes are in."""
    block = block_of_layer(layer, model)
    if block is not None:
        return _part(block)
    return HEAD if layer == model.family.head else EMBEDDINGS


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
        dtype: Arithmetic of the blocks. Layers are solved in float32 always.
        importances: float32 ``[C]`` by layer, in the place of calibration; layers that
            share an input are coded by those of the first.
        room: Where states lie if memory has no room for them.
    """

    description: ModelDescription
    source: TensorSource
    plan: Plan
    quantizers: Mapping[str, Quantizer]
    workdir: WorkDir
    device: str = "cpu"
    propagate: str = "quantized"
    dtype: torch.dtype = torch.float32
    importances: Mapping[str, Tensor] = field(default_factory=dict)
    room: Room | None = None

    @property
    def needs_calibration(self) -> bool:
        """Whether a layer has a method that needs statistics."""
        return any(map(self._needs_statistics, self.plan.layers.values()))

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
        family = self.description.family
        with PartWriter(self.workdir) as writer:
            self._run_end(EMBEDDINGS, family.embedding, windows, writer)
            if windows is None:
                indices = range(self.description.block_count)
                parts = {_part(i): self._stacks(i) for i in indices}
                self._run_without_data(parts, writer)
                self._run_end(HEAD, family.head, None, writer)
            else:
                self._run_with_data(windows, writer)

    def _needs_statistics(self, layer: LayerPlan) -> bool:
        return self.quantizers[layer.method].needs_statistics

    def _run_end(
        self, part: str, name: str, windows: Tensor | None, writer: PartWriter
    ) -> None:
        """Quantize embedding or head, unless the plan leaves it or it is done."""
        layer = self.plan.layers.get(name)
        if layer is None or self.workdir.has_part(part):
            return
        if windows is None or not self._needs_statistics(layer):
            self._run_without_data({part: [[layer]]}, writer)
            return
        found = ends.embedding_statistics(self._streamed(), windows)
        self._save_end(part, layer, found, writer)

    def _save_end(
        self, name: str, layer: LayerPlan, found: LayerStatistics, writer: PartWriter
    ) -> None:
        part = Part(self.quantizers, [[layer]])
        weight = self.source.read(_weight(layer))
        check_finite(weight, _weight(layer))
        part.add([layer], [weight.to(self.device)], found)
        writer.save(name, part)

    def _streamed(self) -> StreamedModel:
        return StreamedModel(
            self.description,
            self.source,
            device=self.device,
            dtype=self.dtype,
            room=self.room,
        )

    def _layers(self, index: int) -> dict[str, LayerPlan]:
        """Return the plan of one block by path inside the block."""
        prefix = f"{self.description.family.block(index)}."
        return {
            linear.path: self.plan.layers[prefix + linear.path]
            for linear in self.description.block_linears(index)
            if prefix + linear.path in self.plan.layers
        }

    def _linears(self, index: int) -> list[Linear]:
        layers = self._layers(index)
        return [x for x in self.description.block_linears(index) if x.path in layers]

    def _stacks(self, index: int) -> list[list[LayerPlan]]:
        return stacks(self._linears(index), self._layers(index))

    def _run_without_data(
        self, parts: Mapping[str, list[list[LayerPlan]]], writer: PartWriter
    ) -> None:
        reader = ReadAhead(self.source, torch.device(self.device))
        todo = [n for n, s in parts.items() if s and not self.workdir.has_part(n)]
        following = iter(todo[1:])
        for name in tqdm(todo, desc="parts", unit="part", disable=None):
            reader.expect(
                _weight(layer)
                for stack in parts.get(next(following, ""), [])
                for layer in stack
            )
            part = Part(self.quantizers, parts[name])
            for stack in parts[name]:
                weights = [_read(reader, layer) for layer in stack]
                known = self.importances.get(stack[0].name)
                part.add(stack, weights, None, importance=known)
            writer.save(name, part)

    def _run_with_data(self, windows: Tensor, writer: PartWriter) -> None:
        model = self._streamed()
        states, dense = self._embedded(model, windows, writer)
        indices = range(self.description.block_count)
        for index in tqdm(indices, desc="blocks", unit="block", disable=None):
            with model.block(index) as block:
                walk = BlockWalk(model, index, block, states, dense)
                if self.workdir.has_part(_part(index)) or not self._layers(index):
                    self._pass_on(index, walk)
                else:
                    writer.save(
                        _part(index), self._finished(index, walk, states, model)
                    )
        self._run_head(model, windows, states, dense, writer)

    def _embedded(
        self, model: StreamedModel, windows: Tensor, writer: PartWriter
    ) -> tuple[Activations, Activations | None]:
        """Return the inputs of block 0, and those of the dense model if it runs too."""
        name = self.description.family.embedding
        if self.propagate == "fp" or name not in self.plan.layers:
            states = model.embed(windows)
            return states, model.copy(states) if self.needs_drift else None
        writer.wait()
        codes = self.workdir.read_layer(EMBEDDINGS, name)
        coded = CompressedSource(self.source, self.plan, lambda _: codes)
        states = model.with_source(coded).embed(windows)
        return states, model.embed(windows) if self.needs_drift else None

    def _run_head(
        self,
        model: StreamedModel,
        windows: Tensor,
        states: Activations,
        dense: Activations | None,
        writer: PartWriter,
    ) -> None:
        layer = self.plan.layers.get(self.description.family.head)
        if layer is None or not self._needs_statistics(layer):
            self._run_end(HEAD, self.description.family.head, None, writer)
        elif not self.workdir.has_part(HEAD):
            found = ends.head_statistics(model, windows, states, dense)
            self._save_end(HEAD, layer, found, writer)

    def _pass_on(self, index: int, walk: BlockWalk) -> None:
        """Send all states through a block whose codes are there."""
        codes = {}
        if self.propagate == "quantized":
            codes = {
                path: self.workdir.read_layer(_part(index), layer.name)
                for path, layer in self._layers(index).items()
            }
        walk.pass_on({path: tensor.dequantize() for path, tensor in codes.items()})

    def _finished(
        self, index: int, walk: BlockWalk, states: Activations, model: StreamedModel
    ) -> Part:
        """Send all states through a block; return its codes, tuned if a method asks."""
        layers = self._layers(index)
        asked = {
            path: tuning
            for path, layer in layers.items()
            if (tuning := self.quantizers[layer.method].block_tuning) is not None
        }
        if not asked:
            return self._code(index, walk)
        inputs, wanted = model.copy(states), model.copy(states)
        model.advance(index, wanted)
        part = self._code(index, walk)
        call = states.calls[index]
        tuned = tune_block(
            {path: part.tensors[layer.name] for path, layer in layers.items()},
            lambda hidden, weights: model.call_block(
                index, hidden, call, weights=weights
            ),
            lambda rows: (model.windows(inputs, rows), model.windows(wanted, rows)),
            shape=(inputs.hidden.shape[0], inputs.hidden.shape[1]),
            tuning=next(iter(asked.values())),
        )
        part.tensors |= {layers[path].name: x for path, x in tuned.items()}
        if self.propagate == "quantized":
            states.hidden, states.pages = inputs.hidden, inputs.pages
            for path, tensor in tuned.items():
                walk.replace(path, tensor.dequantize())
            model.advance(index, states)
        return part

    def _code(self, index: int, walk: BlockWalk) -> Part:
        """Send all states through a block, and quantize its layers on the way."""
        layers, linears = self._layers(index), self._linears(index)
        paths = {layer.name: path for path, layer in layers.items()}
        part = Part(self.quantizers, self._stacks(index))

        def settle(shared: str, moments: Moments) -> None:
            readers = [linear for linear in linears if linear.input == shared]
            statistics = moments.statistics(layers[readers[0].path].name)
            few = experts.few_tokens(readers[0], statistics)
            for stack in stacks(readers, layers):
                weights = [
                    self._exact(layer, walk.weight(paths[layer.name]))
                    for layer in stack
                ]
                found = part.add(stack, weights, statistics, few)
                if self.propagate == "quantized":
                    for layer, values in zip(stack, found, strict=True):
                        walk.replace(paths[layer.name], values)

        walk.run(linears, settle)
        return part

    def _exact(self, layer: LayerPlan, weight: Tensor) -> Tensor:
        """Return a weight as stored; ``weight`` is in the arithmetic of the blocks."""
        stored = self.description.tensors[_weight(layer)].dtype
        if self.dtype in (torch.float32, TORCH_DTYPES.get(stored)):
            return weight
        return self.source.read(_weight(layer)).to(weight.device)


def _part(index: int) -> str:
    return f"{index:04d}"


def _weight(layer: LayerPlan) -> str:
    return f"{layer.name}.weight"


def _read(reader: ReadAhead, layer: LayerPlan) -> Tensor:
    weight = reader.read(_weight(layer))
    check_finite(weight, _weight(layer))
    return weight
