"""Pruning a model block by block into a checkpoint folder.

What is decided for the whole model (blocks to drop, what neurons are worth, widths) is
kept in ``WORKDIR/pruning``; each finished block is a shard of ``WORKDIR/pruned``. One
block is on the device, and a killed run goes on behind its last shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from compress.config.prune_section import PruneSection
from compress.core.artifact import ModelDescription, TensorInfo, TensorSource
from compress.core.contracts import Pruner
from compress.core.neurons import GatedMLP, NeuronStatistics, loudest
from compress.core.tensors import TORCH_DTYPES
from compress.model.sources import in_model_order
from compress.model.states import Activations
from compress.model.streaming import StreamedModel
from compress.pruning.dealing import Dealer
from compress.pruning.depth import choose_blocks
from compress.pruning.gradients import Gradients
from compress.pruning.places import MLPPlace, mlp_places
from compress.pruning.repair import Repaired, repaired
from compress.pruning.shards import ShardFolder
from compress.pruning.statistics import run_through, unseen, watched
from compress.pruning.surgery import cut_rows, with_mlp_widths, without_blocks
from compress.pruning.target import Target
from compress.workdir import WorkDir

FOLDER, WORK = "pruned", "pruning"


@dataclass
class Pruning:
    """One pruning on its way.

    Attributes:
        model: Dense.
        source: Its tensors.
        section: Of the config.
        pruner: The method.
        target: How much.
        root: Work directory of the run.
        device: Where blocks run and matrices are solved.
        dtype: Arithmetic of the blocks. Systems are solved in float64.
        seed: Of drawn labels.
    """

    model: ModelDescription
    source: TensorSource
    section: PruneSection
    pruner: Pruner
    target: Target
    root: Path
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def needs_windows(self) -> bool:
        """Whether calibration text has to be run."""
        return (
            self.pruner.needs_activations
            or self.repair != "none"
            or self.target.dropped > 0
            or self.budgets != "uniform"
        )

    @property
    def repair(self) -> str:
        """The repair that is made."""
        if self.section.repair != "auto":
            return self.section.repair
        return "least_squares" if self.pruner.needs_activations else "none"

    @property
    def budgets(self) -> str:
        """How neurons are dealt to blocks."""
        if self.section.shape == "uniform":
            return "uniform"
        given = self.section.budgets
        return self.pruner.budgets if given == "auto" else given

    def provisional(self) -> ModelDescription:
        """Return a description of the size to come, before anything is measured."""
        last = range(self.model.block_count - 1, 0, -1)
        dropped = list(last)[: self.target.dropped]
        model, _ = without_blocks(self.model, self.source, dropped)
        return self._described(model, Dealer(self, model, self.source).provisional())

    def run(
        self, windows: Tensor | None, fingerprint: Mapping[str, str]
    ) -> dict[str, Any]:
        """Prune what is not pruned yet, and return what a report says of it.

        Args:
            windows: int64 ``[N, T]``, if :attr:`needs_windows`.
            fingerprint: Digest of each thing that decides the result, by name.
        """
        folder, work = ShardFolder(self.root / FOLDER), WorkDir(self.root / WORK)
        work.begin(fingerprint, overwrite=False)
        dropped = work.stage("blocks", lambda: self._blocks(windows))
        model, source = without_blocks(self.model, self.source, dropped)
        dealer = Dealer(self, model, source)
        gradients = dealer.gradients(work, windows)
        widths = work.stage("widths", lambda: dealer.widths(windows, gradients))
        described = self._described(model, widths)
        if not folder.complete:
            walk = _Walk(self, model, source, folder, widths, gradients)
            walk.run(windows)
        record = self._record(dropped, widths, folder)
        if not folder.complete:
            about = {key: record[key] for key in ("method", "dropped", "checksum")}
            folder.finish(described, source, {"compress_pruning": about})
        return record

    def streamed(self, model: ModelDescription, source: TensorSource) -> StreamedModel:
        """Return a model that runs where this pruning does."""
        return StreamedModel(model, source, device=self.device, dtype=self.dtype)

    def _blocks(self, windows: Tensor | None) -> list[int]:
        if not self.target.dropped:
            return []
        assert windows is not None
        return choose_blocks(
            self.model,
            self.source,
            windows,
            count=self.target.dropped,
            by=self.section.depth_by,
            streamed=self.streamed,
        )

    def _described(
        self, model: ModelDescription, widths: Sequence[int]
    ) -> ModelDescription:
        found = with_mlp_widths(model, widths)
        if self.repair != "bias":
            return found
        config = {**found.config, "mlp_bias": True}
        tensors = dict(found.tensors)
        for index in range(found.block_count):
            for place in mlp_places(found, index):
                for name in (*place.rows, place.down):
                    info = found.tensors[f"{name}.weight"]
                    tensors[f"{name}.bias"] = TensorInfo(info.shape[:1], info.dtype)
        ordered = in_model_order(tensors, found.family)
        return replace(found, config=config, tensors=ordered)

    def _record(
        self, dropped: Sequence[int], widths: Sequence[int], folder: ShardFolder
    ) -> dict[str, Any]:
        blocks = [json.loads(folder.metadata(i)["record"]) for i in range(len(widths))]
        left = [i for i in range(self.model.block_count) if i not in dropped]
        kept = hashlib.sha256(json.dumps([b["kept"] for b in blocks]).encode())
        before = sum(self.target.widths)
        return {
            "method": self.pruner.name,
            "source": self.pruner.source,
            "budgets": self.budgets,
            "repair": self.repair,
            "shape": self.section.shape,
            "round_to": self.target.unit,
            "propagate": self.section.propagate,
            "dropped": sorted(dropped),
            "neurons": {"before": before, "after": sum(widths)},
            "checksum": kept.hexdigest()[:16],
            "blocks": [
                {"block": old, "before": self.target.widths[old], "after": width}
                | {key: block[key] for key in ("error", "unseen")}
                for old, width, block in zip(left, widths, blocks, strict=True)
            ],
        }


class _Walk:
    """The last pass: statistics, choice and repair of each block, saved as a shard."""

    def __init__(
        self,
        pruning: Pruning,
        model: ModelDescription,
        source: TensorSource,
        folder: ShardFolder,
        widths: Sequence[int],
        gradients: Mapping[str, Gradients],
    ) -> None:
        self._pruning, self._model, self._source = pruning, model, source
        self._folder, self._widths, self._gradients = folder, widths, gradients

    @cached_property
    def _needs_states(self) -> bool:
        pruning = self._pruning
        return pruning.pruner.needs_activations or pruning.repair != "none"

    @torch.no_grad()
    def run(self, windows: Tensor | None) -> None:
        """Write the shards that are not there."""
        count = self._model.block_count
        blocks = tqdm(range(count), desc="pruning", unit="block", disable=None)
        if not self._needs_states:
            for index in blocks:
                if not self._folder.has_block(index):
                    self._save(index, {})
            return
        assert windows is not None
        running = self._pruning.streamed(self._model, self._source)
        states = running.embed(windows)
        for index in blocks:
            with running.block(index) as block:
                self._block(running, index, block, states)

    def _block(
        self, running: StreamedModel, index: int, block: nn.Module, states: Activations
    ) -> None:
        places = mlp_places(self._model, index)
        dense = self._pruning.section.propagate == "dense"
        if not self._folder.has_block(index):
            with watched(block, places) as moments:
                if dense:
                    running.advance(index, states)
                else:
                    run_through(running, index, states)
            found = {}
            for place in places:
                own = moments[place.path]
                enough = place.expert is None or own.tokens >= place.neurons
                effect = self._gradients.get(place.path)
                found[place.path] = (
                    own.result(place.down, effect.effect if effect else None)
                    if enough
                    else None
                )
            self._save(index, found)
        elif dense:
            running.advance(index, states)
        if not dense:
            self._replace(index, block, places)
            running.advance(index, states)

    def _replace(
        self, index: int, block: nn.Module, places: Sequence[MLPPlace]
    ) -> None:
        """Let a loaded block compute what its shard does, in the shapes it has."""
        from safetensors.torch import load_file

        kept = json.loads(self._folder.metadata(index)["record"])["kept"]
        stored = load_file(self._folder.path(index))
        for place in places:
            layer = block.get_submodule(place.down_path)
            weight = layer.get_parameter("weight")
            cut = torch.zeros_like(weight)
            ours = torch.tensor(kept[place.path], device=weight.device)
            cut[:, ours] = stored[f"{place.down}.weight"].to(weight)
            weight.data = cut
            bias = stored.get(f"{place.down}.bias")
            if bias is not None:
                layer.bias = nn.Parameter(bias.to(weight), requires_grad=False)

    def _save(
        self, index: int, statistics: Mapping[str, NeuronStatistics | None]
    ) -> None:
        places = mlp_places(self._model, index)
        tensors: dict[str, Tensor] = {}
        kept: dict[str, list[int]] = {}
        errors: list[float] = []
        for place in places:
            cut, chosen, result = self._cut(
                place, statistics.get(place.path), self._widths[index]
            )
            tensors |= cut
            kept[place.path] = chosen.tolist()
            if result.error is not None:
                errors.append(result.error)
        prefix = f"{self._model.family.block(index)}."
        for name in self._model.tensors:
            if name.startswith(prefix) and name not in tensors:
                tensors[name] = self._source.read(name)
        unseen_ = sum(found is None for found in statistics.values())
        record = {
            "kept": kept,
            "error": sum(errors) / len(errors) if errors else None,
            "unseen": unseen_,
        }
        self._folder.save_block(index, tensors, {"record": json.dumps(record)})

    def _cut(
        self, place: MLPPlace, found: NeuronStatistics | None, width: int
    ) -> tuple[dict[str, Tensor], Tensor, Repaired]:
        """Return the tensors of one MLP, which neurons stay, and the repair."""
        pruning = self._pruning
        mlp = place.read(lambda name: self._source.read(name).to(pruning.device))
        kept = choose(pruning.pruner, mlp, found, width)
        repair = pruning.repair if found is not None else "none"
        result = repaired(mlp, found, kept, repair)
        info = self._model.tensors[f"{place.down}.weight"]
        dtype = TORCH_DTYPES[info.dtype]
        tensors = cut_rows(place, self._source, kept)
        tensors[f"{place.down}.weight"] = result.down.to(dtype)
        if pruning.repair == "bias":
            for name in (*place.rows, place.down):  # the config knows all or none
                rows = len(tensors[f"{name}.weight"])
                tensors.setdefault(f"{name}.bias", torch.zeros(rows, dtype=dtype))
            own = f"{place.down}.bias"
            if own in self._model.tensors:
                tensors[own] = self._source.read(own)
            if result.bias is not None:
                tensors[own] = (tensors[own].to(result.bias) + result.bias).to(dtype)
        return tensors, kept, result


def choose(
    pruner: Pruner, mlp: GatedMLP, found: NeuronStatistics | None, width: int
) -> Tensor:
    """Return the neurons that stay; without statistics, by weights alone."""
    if width == mlp.neurons:
        return torch.arange(width, device=mlp.down.device)
    if not pruner.needs_activations:
        return pruner.select(mlp, None, width)
    if found is None:
        return pruner.select(mlp, unseen(mlp), width)
    return pruner.select(mlp, found, width, loudest(found))
