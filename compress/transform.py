"""Carrying out a plan, one decoder block at a time, with a checkpoint after each.

With a calibrated method, hidden states of the calibration windows travel through the
blocks: those of the compressed model, and of the dense one where a method corrects for
drift. Without one, layers are read and coded one by one and nothing is ever run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from compress.block_tuning import tune_jointly
from compress.calibration import ends, experts
from compress.calibration.walk import BlockWalk, Measure
from compress.core import replay
from compress.core.artifact import ModelDescription, TensorInfo, TensorSource
from compress.core.contracts import Quantizer
from compress.core.errors import PlanError
from compress.core.families import Linear
from compress.core.plan import LayerPlan, Plan
from compress.core.scales import TORCH_DTYPES
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor
from compress.distributed.dealing import deal
from compress.distributed.team import Team
from compress.model.prefetch import ReadAhead
from compress.model.sources import check_finite
from compress.model.spill import Room
from compress.model.states import Activations
from compress.model.streaming import StreamedModel
from compress.parts import Job, Part, PartWriter, stacks
from compress.progress import progress_bar
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
    if (block := block_of_layer(layer, model)) is not None:
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
        order: Whether the layers of a block are measured one after the other
            (``layer``) or at once (``block``).
        dtype: Arithmetic of the blocks. Layers are solved in float32 always.
        importances: float32 ``[C]`` by layer, in the place of calibration; layers that
            share an input are coded by those of the first.
        team: The processes that share its windows and layers.
        room: Where states lie if memory has no room for them.
    """

    description: ModelDescription
    source: TensorSource
    plan: Plan
    quantizers: Mapping[str, Quantizer]
    workdir: WorkDir
    device: str = "cpu"
    propagate: str = "quantized"
    order: str = "layer"
    dtype: torch.dtype = torch.float32
    importances: Mapping[str, Tensor] = field(default_factory=dict)
    team: Team = field(default_factory=Team)
    room: Room | None = None

    def __post_init__(self) -> None:
        """Raise if the layers of this model cannot be measured in that order.

        Raises:
            PlanError: It has experts, whose second moments would not fit at once.
        """
        if self.order == "block" and self.description.family.experts is not None:
            raise PlanError(
                f"quantize.order: block: {self.description.family.name} is a mixture; "
                "its experts are coded in any order already. Leave order out"
            )

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
        embedding, head = map(self.plan.layers.get, (family.embedding, family.head))
        needed = {part_of_layer(name, self.description) for name in self.plan.layers}
        if all(map(self.workdir.has_part, sorted(needed))):  # asked in one order
            return
        if windows is None:
            indices = range(self.description.block_count)
            parts = {EMBEDDINGS: [[embedding]]} if embedding else {}
            parts |= {_part(i): self._stacks(i) for i in indices}
            self._run_without_data(parts | ({HEAD: [[head]]} if head else {}))
        else:
            with PartWriter(self.workdir, writes=self.team.is_first) as writer:
                self._run_embedding(embedding, windows, writer)
                self._run_with_data(windows, writer)
        replay.forget()
        self.team.wait()

    def _needs_statistics(self, layer: LayerPlan) -> bool:
        return self.quantizers[layer.method].needs_statistics

    def _run_embedding(
        self, layer: LayerPlan | None, windows: Tensor, writer: PartWriter
    ) -> None:
        """Quantize the embedding, unless the plan leaves it or it is done."""
        if layer is None or self.workdir.has_part(EMBEDDINGS):
            return
        if not self._needs_statistics(layer):
            self._run_without_data({EMBEDDINGS: [[layer]]})
            return
        found = ends.embedding_statistics(self._streamed(), windows, team=self.team)
        self._save_end(EMBEDDINGS, layer, found, writer)

    def _save_end(
        self, name: str, layer: LayerPlan, found: LayerStatistics, writer: PartWriter
    ) -> None:
        part = self._new_part([[layer]])

        def weights() -> list[Tensor]:
            weight = self.source.read(_weight(layer))
            check_finite(weight, _weight(layer))
            return [weight.to(self.device)]

        (coders,) = part.coders([[layer]])
        part.add_all([Job([layer], weights, found, found.tokens, coders=coders)])
        writer.save(name, part)

    def _new_part(self, layers: list[list[LayerPlan]]) -> Part:
        return Part(self.quantizers, layers, team=self.team, device=self.device)

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

    def _run_without_data(self, parts: Mapping[str, list[list[LayerPlan]]]) -> None:
        """Quantize parts that need no data; each is one process's, which writes it."""
        reader = ReadAhead(self.source, torch.device(self.device))
        missing = [n for n, s in parts.items() if s and not self.workdir.has_part(n)]
        sizes = [sum(math.prod(x.shape) for y in parts[n] for x in y) for n in missing]
        dealt = zip(missing, deal(sizes, self.team.size), strict=True)
        todo = [name for name, owner in dealt if owner == self.team.rank]
        following = iter(todo[1:])
        with PartWriter(self.workdir) as writer:
            for name in progress_bar(todo, desc="parts", unit="part"):
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
        for index in progress_bar(indices, desc="blocks", unit="block"):
            with model.block(index) as block:
                walk = BlockWalk(
                    model, index, block, states, dense, together=self.team.size
                )
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
        windows = self.team.share(windows)
        if self.propagate == "fp" or name not in self.plan.layers:
            states = model.embed(windows)
            return states, model.copy(states) if self.needs_drift else None
        writer.wait()
        self.team.wait()  # the file that is read next is written now
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
        if layer is None:
            return
        if not self._needs_statistics(layer):
            self._run_without_data({HEAD: [[layer]]})
        elif not self.workdir.has_part(HEAD):
            found = ends.head_statistics(model, windows, states, dense, team=self.team)
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
        coded = {path: part.tensors[layer.name] for path, layer in layers.items()}
        tuning = next(iter(asked.values()))
        tuned = tune_jointly(
            coded, model, index, ends=(inputs, wanted), tuning=tuning, team=self.team
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
        part = self._new_part(self._stacks(index))

        def settle(inputs: Mapping[str, Measure]) -> None:
            readers = {
                shared: [linear for linear in linears if linear.input == shared]
                for shared in inputs
            }
            together = {shared: stacks(x, layers) for shared, x in readers.items()}
            coders = iter(part.coders([s for x in together.values() for s in x]))
            jobs = []
            for shared, measure in inputs.items():
                own = [(stack, next(coders)) for stack in together[shared]]
                ranks = sorted({rank for _, by in own for rank in by})
                moments, reader = measure(), readers[shared][0]
                moments.join_(self.team, owner=ranks[0] if len(ranks) == 1 else None)
                statistics, few = None, None
                if self.team.rank in ranks:
                    statistics = moments.statistics(layers[reader.path].name)
                    few = experts.few_tokens(reader, statistics)
                jobs += [
                    Job(
                        stack,
                        partial(weights, stack),
                        statistics,
                        moments.tokens,
                        few,
                        coders=by,
                    )
                    for stack, by in own
                ]
            for job, found in zip(jobs, part.add_all(jobs), strict=True):
                if self.propagate == "quantized":
                    for layer, values in zip(job.layers, found, strict=True):
                        walk.replace(paths[layer.name], values)

        def weights(stack: Sequence[LayerPlan]) -> list[Tensor]:
            return [self._exact(x, walk.weight(paths[x.name])) for x in stack]

        walk_through = walk.run_at_once if self.order == "block" else walk.run
        walk_through(linears, settle)
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
