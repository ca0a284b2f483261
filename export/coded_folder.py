"""What the exporters of folders with tables share: streaming, sizes, reading back.

A child says which tensors a coded layer becomes, makes them, and describes them in
``config.json``. Everything else of the model is dense, in the model's type.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from compress.core.artifact import CompressedModel, ModelDescription, TensorInfo
from compress.core.contracts import Exporter, ExportResult
from compress.core.plan import LayerPlan, Plan
from compress.core.tensors import QuantizedTensor
from compress.export import stock_transformers
from compress.export.hf_files import model_config, write_companions
from compress.export.model_card import CardLayout, model_card
from compress.export.sharding import (
    Entry,
    ShardOptions,
    as_stored,
    parse_size,
    plan_shards,
    write_shards,
)


class CodedFolderExporter(Exporter):
    """Writes safetensors with tensors of its own for coded layers."""

    consumer = "transformers"
    Options: ClassVar[type[ShardOptions]] = ShardOptions

    @abstractmethod
    def _stored(self, layer: LayerPlan) -> Mapping[str, TensorInfo]:
        """Describe the tensors of a coded layer, by suffix."""

    @abstractmethod
    def _encode(self, layer: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Return them; asked once for each layer, before :meth:`_config`."""

    @abstractmethod
    def _config(self, artifact: CompressedModel) -> dict[str, Any]:
        """Return what is added to ``config.json``."""

    @abstractmethod
    def _card(self, model: ModelDescription) -> CardLayout:
        """Return what the model card says about the layout."""

    def notes(self, plan: Plan, model: ModelDescription) -> tuple[str, ...]:
        """Return what a user of the files should know; none of it stops an export."""
        return ()

    def tensor_bytes(self, plan: Plan, model: ModelDescription) -> Mapping[str, int]:
        """Return the bytes of each coded layer, and of each other tensor."""
        return {
            name: sum(entry.size_bytes for entry in entries)
            for name, entries in self._layout(plan, model).items()
        }

    def file_bytes(self, plan: Plan, model: ModelDescription) -> int:
        """Return the bytes of the weight files."""
        entries = [e for part in self._layout(plan, model).values() for e in part]
        shards = plan_shards(entries, self._limit)
        return sum(shard.data_bytes + len(shard.header()) for shard in shards)

    def write(self, artifact: CompressedModel, folder: Path) -> ExportResult:
        """Write weights one layer at a time, then config, tokenizer and card.

        Raises:
            ExportError: A tensor overflows its type, or a file cannot be written.
        """
        plan, model = artifact.plan, artifact.description
        entries = [e for part in self._layout(plan, model).values() for e in part]
        shards = plan_shards(entries, self._limit)
        files = write_shards(folder, shards, self._tensors(artifact))
        size = sum((folder / shard.file).stat().st_size for shard in shards)
        config = model_config(artifact, None)
        if plan.layers:
            config |= self._config(artifact)
        notes = self.notes(plan, model)
        card = model_card(
            artifact, size_bytes=size, notes=notes, layout=self._card(model)
        )
        others = write_companions(model, folder, config, card)
        return ExportResult((*files, *others), size, notes)

    def replay(self, folder: Path, windows: Tensor) -> Iterator[Tensor]:
        """Run the folder in transformers, in float32 on the CPU."""
        return stock_transformers.logits(folder, windows, as_served=False)

    def _layout(self, plan: Plan, model: ModelDescription) -> dict[str, list[Entry]]:
        """Return the stored tensors of each layer or tensor, in checkpoint order."""
        layout: dict[str, list[Entry]] = {}
        for name, info in model.tensors.items():
            layer = plan.layers.get(name.removesuffix(".weight"))
            if layer is None or not name.endswith(".weight"):
                layout[name] = [Entry(name, TensorInfo(info.shape, model.dtype))]
                continue
            layout[layer.name] = [
                Entry(f"{layer.name}.{suffix}", stored)
                for suffix, stored in self._stored(layer).items()
            ]
        return layout

    def _tensors(self, artifact: CompressedModel) -> Iterator[tuple[str, Tensor]]:
        """Yield what :meth:`_layout` describes, holding one layer at a time."""
        model = artifact.description
        for name in model.tensors:
            layer = name.removesuffix(".weight")
            if not name.endswith(".weight") or layer not in artifact.plan.layers:
                yield name, as_stored(name, artifact.source.read(name), model.dtype)
                continue
            stored = self._encode(layer, artifact.quantized(layer))
            for suffix in list(stored):
                yield f"{layer}.{suffix}", stored.pop(suffix)

    @property
    def _limit(self) -> int:
        assert isinstance(self.options, ShardOptions)
        return parse_size(self.options.max_shard_size)
