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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.config.prune_section import PruneSection
from compress.core.artifact import ModelDescription, TensorInfo, TensorSource
from compress.core.contracts import Pruner
from compress.model.loading import ModelHandle
from compress.model.sources import in_model_order
from compress.model.streaming import StreamedModel
from compress.pruning.cutting import Cutter
from compress.pruning.dealing import EXCHANGED, Dealer, exchange_stage
from compress.pruning.depth import UNITS, choose_units
from compress.pruning.heads import kv_heads, with_kv_groups
from compress.pruning.places import mlp_places
from compress.pruning.shards import ShardFolder
from compress.pruning.surgery import with_mlp_widths, without_attention, without_blocks
from compress.pruning.target import Target
from compress.pruning.walk import OF_A_BLOCK, Walk, block_stage
from compress.recovery.generate import stored_windows
from compress.recovery.models import WholeModel
from compress.workdir import WorkDir

FOLDER, WORK = "pruned", "pruning"
_GENERATED = "generated.safetensors"


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
            self.target.dropped > 0
            or self.target.attentions > 0
            or (self.target.cuts_neurons and self.budgets != "uniform")
            or self.measures_blocks
            or self.section.exchanges > 0
        )

    @property
    def measures_blocks(self) -> bool:
        """Whether inputs of what is cut are measured, block by block."""
        cuts = self.target.cuts_neurons or self.section.kv_groups > 0
        return cuts and (self.pruner.needs_activations or self.repair != "none")

    @property
    def corrects(self) -> bool:
        """Whether o and ``down`` make good what went wrong before them."""
        return self.measures_blocks and self.section.propagate == "corrected"

    @property
    def kv_groups(self) -> int:
        """Key-value groups that each block keeps."""
        return kv_heads(self.model) - self.section.kv_groups

    @property
    def repair(self) -> str:
        """The repair that is made."""
        if self.section.repair != "auto":
            return self.section.repair
        return "least_squares" if self.pruner.needs_activations else "none"

    @property
    def depth_by(self) -> str:
        """How blocks or attentions to remove are chosen."""
        if self.section.depth_by != "auto":
            return self.section.depth_by
        return "perplexity" if self.section.depth_unit == "attention" else "importance"

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
        model, source = without_blocks(self.model, self.source, dropped)
        left = range(model.block_count - 1, 0, -1)
        attending = [i for i in left if model.has_attention(i)]
        silent = attending[: self.target.attentions]
        model, _ = without_attention(model, source, silent)
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
        if windows is not None and self.section.generated:
            windows = self._with_own(windows, work)
        gone = work.stage("blocks", lambda: self._units(windows))
        model, source = without_blocks(self.model, self.source, gone["dropped"])
        model, source = without_attention(model, source, gone["attention"])
        dealer = Dealer(self, model, source)
        gradients = dealer.gradients(work, windows)
        widths = work.stage("widths", lambda: dealer.widths(windows, gradients))
        kept: list[list[int]] = []
        if self.section.exchanges:
            assert windows is not None
            kept = dealer.exchanged(work, windows, gradients, widths)
            widths = [len(block) for block in kept]
        described = self._described(model, widths)
        if not folder.complete:
            cutter = Cutter(
                self, source, widths=widths, gradients=gradients, chosen=kept
            )
            Walk(self, model, source, cutter, (folder, work)).run(windows)
        record = self._record(gone, widths, work)
        if not folder.complete:
            about = {key: record[key] for key in ("method", "dropped", "checksum")}
            folder.finish(described, source, {"compress_pruning": about})
        return record

    def tokens(self, windows: Tensor | None) -> int:
        """Return how much text is looked at, the original's own included."""
        if windows is None:
            return 0
        return (len(windows) + self.section.generated) * windows.shape[1]

    def whole(self, model: ModelDescription, source: TensorSource) -> WholeModel:
        """Return a model in memory, where this pruning runs."""
        handle = ModelHandle(model, source)
        return WholeModel(handle, device=self.device, dtype=self.dtype)

    def _with_own(self, windows: Tensor, work: WorkDir) -> Tensor:
        """Return the windows and those that the original writes, shuffled."""
        written = stored_windows(
            lambda: self.whole(self.model, self.source),
            windows,
            count=self.section.generated,
            seed=self.seed,
            file=work.root / _GENERATED,
        )
        both = torch.cat([windows, written])
        order = torch.Generator().manual_seed(self.seed)
        return both[torch.randperm(len(both), generator=order)]

    def streamed(self, model: ModelDescription, source: TensorSource) -> StreamedModel:
        """Return a model that runs where this pruning does."""
        return StreamedModel(model, source, device=self.device, dtype=self.dtype)

    def _units(self, windows: Tensor | None) -> dict[str, list[int]]:
        """Return the blocks that go, and those whose attention goes."""
        target, unit = self.target, self.section.depth_unit
        chosen: list[int] = []
        if target.dropped or target.attentions:
            assert windows is not None
            chosen = choose_units(
                self.model,
                self.source,
                windows,
                unit=UNITS[unit],
                count=target.dropped + target.attentions,
                by=self.depth_by,
                streamed=self.streamed,
            )
        none: list[int] = []
        if unit == "attention":
            return {"dropped": none, "attention": chosen}
        return {"dropped": chosen, "attention": none}

    def _described(
        self, model: ModelDescription, widths: Sequence[int]
    ) -> ModelDescription:
        found = with_kv_groups(with_mlp_widths(model, widths), self.kv_groups)
        if self.repair != "bias" or not self.target.cuts_neurons:
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
        self, gone: Mapping[str, list[int]], widths: Sequence[int], work: WorkDir
    ) -> dict[str, Any]:
        dropped = gone["dropped"]
        blocks = [work.finished(block_stage(i)) for i in range(len(widths))]
        left = [i for i in range(self.model.block_count) if i not in dropped]
        kept = hashlib.sha256(json.dumps([b["kept"] for b in blocks]).encode())
        before = sum(self.target.widths)
        heads = {"before": kv_heads(self.model), "after": self.kv_groups}
        return {
            "method": self.pruner.name,
            "source": self.pruner.source,
            "budgets": self.budgets,
            "repair": self.repair,
            "shape": self.section.shape,
            "round_to": self.target.unit,
            "propagate": self.section.propagate,
            "exchanges": self._rounds(work),
            "generated": self.section.generated,
            "depth_by": self.depth_by,
            "dropped": sorted(dropped),
            "attention_removed": sorted(gone["attention"]),
            "neurons": {"before": before, "after": sum(widths)},
            "kv_groups": heads
            | {"by": "activations" if self.measures_blocks else "weights"},
            "checksum": kept.hexdigest()[:16],
            "blocks": [
                {"block": old, "before": self.target.widths[old], "after": width}
                | {key: block[key] for key in OF_A_BLOCK}
                for old, width, block in zip(left, widths, blocks, strict=True)
            ],
        }

    def _rounds(self, work: WorkDir) -> list[dict[str, Any]]:
        """Return what each round of exchanges did."""
        rounds = [
            work.finished(exchange_stage(i)) for i in range(self.section.exchanges)
        ]
        return [{key: made[key] for key in EXCHANGED} for made in rounds]
