"""Making levels: each layer at each candidate scheme, once, from dense statistics.

The dense model runs over the calibration text block by block, as in a run that
quantizes; but here no layer is replaced, so that every level is made from what the
dense model feeds to it, and levels can be swapped one by one. What is in the store is
not made again, and blocks behind the last one that lacks a level do not run at all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.allocation.store import Level, LevelStore, digest
from compress.calibration import ends, experts
from compress.calibration.walk import BlockWalk, Measure
from compress.core import replay
from compress.core.artifact import ModelDescription, TensorSource
from compress.core.contracts import Quantizer
from compress.core.errors import CheckpointError
from compress.core.families import Linear
from compress.core.plan import LayerPlan
from compress.core.statistics import LayerStatistics
from compress.distributed.dealing import deal
from compress.distributed.team import Team
from compress.model.sources import check_finite
from compress.model.streaming import StreamedModel
from compress.parts import Part, stacks
from compress.progress import progress_bar

_LAYOUT = 4  # counted up when levels are made in another way, or stored in another

Levels = Mapping[LayerPlan, Level]


@dataclass
class LevelMaker:
    """Fills a store with the levels of a model.

    Attributes:
        description: The model.
        source: Its dense tensors.
        quantizers: The methods, by name.
        store: Where levels go.
        identity: Plain data on all that decides statistics besides the weights of the
            layer itself: model, transforms, calibration text, arithmetic.
        device: Where blocks run and layers are solved.
        dtype: Arithmetic of the blocks.
        team: The processes that fill it. Each runs its share of the windows and makes
            its share of the levels; all see the same folder.
    """

    description: ModelDescription
    source: TensorSource
    quantizers: Mapping[str, Quantizer]
    store: LevelStore
    identity: Any
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    team: Team = field(default_factory=Team)

    def make(self, wanted: Sequence[LayerPlan], windows: Tensor) -> Levels:
        """Return all levels, making those that are not there.

        Args:
            wanted: Each a layer at one scheme.
            windows: int64 ``[N, T]`` calibration tokens.
        """
        keys = self._keys(wanted)
        found = self._find(list(keys.values()))
        missing = {layer: key for layer, key in keys.items() if key not in found}
        if missing:
            self._make(missing, windows)
            self.team.wait()  # what others make is read next
            found |= self._find(list(missing.values()))
        absent = [layer.name for layer, key in keys.items() if key not in found]
        if absent:
            raise CheckpointError(
                f"levels of {absent[0]} and {len(absent) - 1} more that were made are "
                f"not in {self.store.folder}; under torchrun, set COMPRESS_CACHE to a "
                "folder that all hosts see"
            )
        return {layer: found[key] for layer, key in keys.items()}

    def _find(self, keys: Sequence[str]) -> dict[str, Level]:
        """Return what the first process finds in the store, by key."""

        def find() -> dict[str, Level]:
            found = {key: self.store.find(key) for key in keys}
            return {key: level for key, level in found.items() if level is not None}

        return self.team.alone(find)

    def _keys(self, wanted: Sequence[LayerPlan]) -> dict[LayerPlan, str]:
        names = self.team.mine(list(dict.fromkeys(layer.name for layer in wanted)))
        own = {
            name: _digest(self.source.read(f"{name}.weight"))
            for name in progress_bar(names, desc="levels", leave=False)
        }
        weights = {k: v for found in self.team.gather(own) for k, v in found.items()}
        keys = {}
        for layer in wanted:
            quantizer = self.quantizers[layer.method]
            keys[layer] = digest(
                {
                    "layout": _LAYOUT,
                    "identity": self.identity,
                    "layer": layer.name,
                    "weight": weights[layer.name],
                    "method": layer.method,
                    "options": quantizer.options.model_dump(mode="json"),
                    "scheme": layer.scheme.to_dict(),
                }
            )
        return keys

    def _make(self, missing: Mapping[LayerPlan, str], windows: Tensor) -> None:
        blocks = self._by_block(missing)
        inside = {layer for block in blocks for layer in block}
        outside = [layer for layer in missing if layer not in inside]
        at_end = self._ends(outside, missing, windows)
        last = max((i for i, wanted in enumerate(blocks) if wanted), default=-1)
        if at_end:
            last = len(blocks) - 1
        if last < 0:
            return
        model = StreamedModel(
            self.description, self.source, device=self.device, dtype=self.dtype
        )
        states = model.embed(self.team.share(windows))
        for index in progress_bar(range(last + 1), desc="levels", unit="block"):
            with model.block(index) as block:
                walk = BlockWalk(model, index, block, states)
                if blocks[index]:
                    self._run_block(index, walk, blocks[index], missing)
                elif index < last or at_end:
                    walk.pass_on({})
        if at_end:
            found = ends.head_statistics(model, windows, states, team=self.team)
            if self.description.tied:
                found = ends.embedding_statistics(model, windows, found, team=self.team)
            for layer in self.team.mine(at_end):
                self._store_end(layer, missing, found)
        replay.forget()

    def _ends(
        self,
        layers: Sequence[LayerPlan],
        missing: Mapping[LayerPlan, str],
        windows: Tensor,
    ) -> list[LayerPlan]:
        """Make levels of embedding and head, but for those that need the last states.

        These are returned: of a calibrated head, or of a matrix that is both.
        """
        family, left, now = self.description.family, [], []
        for layer in layers:
            needs = self.quantizers[layer.method].needs_statistics
            if needs and (self.description.tied or layer.name == family.head):
                left.append(layer)
            else:
                now.append(layer)
        embedding: LayerStatistics | None = None
        for layer in self.team.mine(now):
            if not self.quantizers[layer.method].needs_statistics:
                self._store_end(layer, missing, None)
                continue
            if embedding is None:
                model = StreamedModel(
                    self.description, self.source, device=self.device, dtype=self.dtype
                )
                embedding = ends.embedding_statistics(model, windows)
            self._store_end(layer, missing, embedding)
        return left

    def _store_end(
        self,
        layer: LayerPlan,
        keys: Mapping[LayerPlan, str],
        statistics: LayerStatistics | None,
    ) -> None:
        weight = self.source.read(f"{layer.name}.weight").to(self.device)
        check_finite(weight, f"{layer.name}.weight")
        self._store([layer], [weight], keys, statistics=statistics, few=None)

    def _by_block(self, missing: Mapping[LayerPlan, str]) -> list[list[LayerPlan]]:
        family = self.description.family
        by_name: dict[str, list[LayerPlan]] = {}
        for layer in missing:
            by_name.setdefault(layer.name, []).append(layer)
        return [
            [
                layer
                for linear in self.description.block_linears(index)
                for layer in by_name.get(f"{family.block(index)}.{linear.path}", [])
            ]
            for index in range(self.description.block_count)
        ]

    def _run_block(
        self,
        index: int,
        walk: BlockWalk,
        wanted: Sequence[LayerPlan],
        keys: Mapping[LayerPlan, str],
    ) -> None:
        prefix = f"{self.description.family.block(index)}."
        by_path: dict[str, list[LayerPlan]] = {}
        for layer in wanted:
            by_path.setdefault(layer.name.removeprefix(prefix), []).append(layer)
        linears = [
            x for x in self.description.block_linears(index) if x.path in by_path
        ]

        def settle(inputs: Mapping[str, Measure]) -> None:
            for shared, measure in inputs.items():
                readers = [linear for linear in linears if linear.input == shared]
                moments = measure()
                moments.join_(self.team)
                statistics = moments.statistics(prefix + readers[0].path)
                few = experts.few_tokens(readers[0], statistics)
                for stack in self._own(_stacks(readers, by_path)):
                    weights = [self.source.read(f"{x.name}.weight") for x in stack]
                    on_device = [weight.to(self.device) for weight in weights]
                    self._store(stack, on_device, keys, statistics=statistics, few=few)

        walk.run(linears, settle)

    def _own(self, found: Sequence[list[LayerPlan]]) -> list[list[LayerPlan]]:
        """Return the stacks that this process makes."""
        costs = [float(sum(x.shape[0] for x in stack)) for stack in found]
        owners = deal(costs, self.team.size)
        return [
            stack
            for stack, owner in zip(found, owners, strict=True)
            if owner == self.team.rank
        ]

    def _store(
        self,
        stack: Sequence[LayerPlan],
        weights: Sequence[Tensor],
        keys: Mapping[LayerPlan, str],
        *,
        statistics: LayerStatistics | None,
        few: str | None,
    ) -> None:
        part = Part(self.quantizers, [stack])
        part.add(stack, weights, statistics, few)
        part.close()
        for layer, weight in zip(stack, weights, strict=True):
            record = part.records[layer.name]
            error = record.weight_error if record.error is None else record.error
            traits = _traits(weight.float(), statistics)
            level = Level(keys[layer], error, **traits, seconds=record.seconds)
            self.store.write(level, part.tensors[layer.name])


def _stacks(
    linears: Sequence[Linear], by_path: Mapping[str, Sequence[LayerPlan]]
) -> list[list[LayerPlan]]:
    """Return what is coded as one matrix: layers of one input, scheme by scheme."""
    found = []
    ranks = max(len(by_path[linear.path]) for linear in linears)
    for rank in range(ranks):
        here = [linear for linear in linears if rank < len(by_path[linear.path])]
        layers = {linear.path: by_path[linear.path][rank] for linear in here}
        found += stacks(here, layers)
    return found


def _traits(weight: Tensor, statistics: LayerStatistics | None) -> dict[str, float]:
    found = {
        "weight_std": float(weight.std()),
        "weight_mean": float(weight.abs().mean()),
        "energy": float(weight.square().sum()),
        "input_mean": 1.0,
        "input_max": 1.0,
    }
    if statistics is None or not statistics.tokens:
        return found
    hessian, tokens = statistics.hessian, 2 * statistics.tokens
    squares = hessian.diagonal() / tokens
    energy = float(((weight @ hessian) * weight).sum()) / tokens
    return found | {
        "energy": energy,
        "input_mean": math.sqrt(float(squares.mean())),
        "input_max": math.sqrt(float(squares.max())),
    }


def _digest(weight: Tensor) -> str:
    data = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    found = hashlib.sha256(f"{weight.dtype}{list(weight.shape)}".encode())
    found.update(data.numpy().data)
    return found.hexdigest()
