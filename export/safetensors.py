"""Safetensors checkpoint that stock transformers and vLLM load.

Coded layers are stored in the layouts of compressed-tensors (the codes exactly as the
quantizer chose them, see ``core/compressed_tensors``), everything else dense in the
model's type; config, tokenizer and model card lie beside. A plan without layers gives
an ordinary dense checkpoint, and so does ``dense: true``, with the decoded values.

Source: compressed-tensors 0.20 and the loaders of transformers 5.23. What we do
differently: every layer is named in its config group instead of matched by class, so
that a config group never covers a layer that has no codes, and files are streamed (see
``sharding``). Limits: see ``safetensors_checks``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from compress.core import compressed_tensors as ct
from compress.core.artifact import CompressedModel, ModelDescription, TensorInfo
from compress.core.contracts import Exporter, ExportResult, Problem
from compress.core.errors import CheckpointError
from compress.core.plan import Plan
from compress.core.tensors import QuantizedTensor
from compress.export import safetensors_checks, stock_transformers, vllm_rules
from compress.export.experts import expert_layers, is_target
from compress.export.hf_files import (
    model_config,
    quantization_config,
    write_companions,
)
from compress.export.model_card import model_card
from compress.export.outer_scales import OuterScales
from compress.export.sharding import (
    Entry,
    ShardOptions,
    as_stored,
    has_tensor,
    parse_size,
    plan_shards,
    read_tensor,
    write_shards,
)


class SafetensorsOptions(ShardOptions):
    """Options of the safetensors exporter.

    Attributes:
        runtime: What has to load the files. ``vllm`` also asks for what vLLM needs and
            transformers does not, such as one scheme for layers that it fuses.
        dense: Write decoded values in the model's type instead of codes. Anything loads
            them, and they are as large as the original.
    """

    runtime: Literal["transformers", "vllm"] = "transformers"
    dense: bool = False


class SafetensorsExporter(Exporter):
    """Writes compressed-tensors checkpoints with config, tokenizer and card."""

    name = "safetensors"
    summary = "compressed-tensors checkpoint for transformers and vLLM"
    source = "compressed-tensors 0.20"
    consumer = "transformers"
    Options = SafetensorsOptions

    @property
    def keeps_codes(self) -> bool:
        """Whether codes are written, and not decoded values."""
        return not self._options.dense

    def check(self, plan: Plan, model: ModelDescription) -> list[Problem]:
        """List what cannot be stored, or what the runtime cannot load back."""
        options = self._options
        return safetensors_checks.problems(
            plan, model, runtime=options.runtime, dense=options.dense
        )

    def notes(self, plan: Plan, model: ModelDescription) -> tuple[str, ...]:
        """Return what a user of the files should know; none of it stops an export."""
        return safetensors_checks.notes(plan, model, dense=self._options.dense)

    def tensor_bytes(self, plan: Plan, model: ModelDescription) -> Mapping[str, int]:
        """Return the bytes of each coded layer, and of each other tensor."""
        return {
            name: sum(entry.size_bytes for entry in entries)
            for name, entries in self._layout(plan, model).items()
        }

    def file_bytes(self, plan: Plan, model: ModelDescription) -> int:
        """Return the bytes of the weight files, without static scales of a cache."""
        entries = [e for part in self._layout(plan, model).values() for e in part]
        shards = plan_shards(entries, parse_size(self._options.max_shard_size))
        return sum(shard.data_bytes + len(shard.header()) for shard in shards)

    def bound_layers(self, model: ModelDescription) -> Sequence[tuple[str, ...]]:
        """Return the experts as one, and what vLLM fuses if it is the runtime."""
        if self._options.dense:
            return ()
        experts = expert_layers(model)
        found = [tuple(experts)] if experts else []
        if self._options.runtime == "vllm":
            found += vllm_rules.fused_layers(model)
        return found

    def write(self, artifact: CompressedModel, folder: Path) -> ExportResult:
        """Write weights one layer at a time, then config, tokenizer and card.

        Raises:
            ExportError: A tensor overflows the model's type, a layer lacks the largest
                input that its scheme needs, fused layers disagree in what vLLM makes
                them share, or a file cannot be written.
        """
        plan, model, dense = artifact.plan, artifact.description, self._options.dense
        if not dense:
            safetensors_checks.check_input_amax(artifact)
        entries = [e for part in self._layout(plan, model).values() for e in part]
        entries += [
            Entry(name, TensorInfo(tuple(scale.shape), "float32"))
            for name, scale in artifact.kv_scales.items()
        ]
        limit = parse_size(self._options.max_shard_size)
        shards = plan_shards(entries, limit)
        outer = OuterScales(model, strict=self._options.runtime == "vllm")
        files = write_shards(folder, shards, self._tensors(artifact, outer))
        weights = [folder / shard.file for shard in shards]
        size = sum(path.stat().st_size for path in weights)
        notes = (*self.notes(plan, model), *outer.notes())
        card = model_card(artifact, size_bytes=size, notes=notes, dense=dense)
        quantization = quantization_config(artifact, dense=dense)
        config = model_config(artifact, quantization, dense=dense)
        others = write_companions(model, folder, config, card)
        return ExportResult((*files, *others), size, notes)

    def read_codes(self, folder: Path, layer: str) -> QuantizedTensor:
        """Decode one layer from the written files with our own reader.

        Raises:
            CheckpointError: The folder holds no codes of ``layer``.
        """
        group = _group_of(folder, layer)
        layout = ct.layout_named(group["format"])
        stored = {
            suffix: read_tensor(folder, f"{layer}.{suffix}")
            for suffix in (layout.codes, *ct.SUFFIXES)
            if has_tensor(folder, f"{layer}.{suffix}")
        }
        if ct.SCALE not in stored or layout.codes not in stored:
            raise CheckpointError(f"{folder}: {layer} lacks codes or scales")
        dtype = str(stored[ct.SCALE].dtype).removeprefix("torch.")
        scheme = ct.scheme_of_group(group, group["format"], dtype)
        rows, width = stored[layout.codes].shape
        columns = layout.columns(width) or int(stored["weight_shape"][1])
        return layout.decode(stored, scheme, (rows, columns))

    def replay(self, folder: Path, windows: Tensor) -> Iterator[Tensor]:
        """Run the weights of the files in stock transformers, in float32 on the CPU.

        What the config says about inputs and the key-value cache is left out; it is in
        :meth:`serve`. Integer zero points that are packed load with
        ``dequantize=True``.

        Raises:
            MissingDependencyError: compressed-tensors is not installed.
        """
        return stock_transformers.logits(folder, windows, as_served=False)

    def serve(self, folder: Path, windows: Tensor) -> Iterator[Tensor] | None:
        """Run the files as transformers does, rounding inputs and cache, if it does."""
        if not stock_transformers.rounds_more_than_weights(folder):
            return None
        return stock_transformers.logits(folder, windows, as_served=True)

    def _layout(self, plan: Plan, model: ModelDescription) -> dict[str, list[Entry]]:
        """Return the stored tensors of each layer or tensor, in checkpoint order."""
        layout: dict[str, list[Entry]] = {}
        for name, info in model.tensors.items():
            layer = plan.layers.get(name.removesuffix(".weight"))
            if layer is None or not name.endswith(".weight") or self._options.dense:
                layout[name] = [Entry(name, TensorInfo(info.shape, model.dtype))]
                continue
            stored = ct.layout_of(layer.scheme).tensors(layer.scheme, layer.shape)
            layout[layer.name] = [
                Entry(f"{layer.name}.{s}", i) for s, i in stored.items()
            ]
        return layout

    def _tensors(
        self, artifact: CompressedModel, outer: OuterScales
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what :meth:`_layout` describes, holding one layer at a time."""
        model = artifact.description
        for name in model.tensors:
            layer = name.removesuffix(".weight")
            if not name.endswith(".weight") or layer not in artifact.plan.layers:
                yield name, as_stored(name, artifact.source.read(name), model.dtype)
            elif self._options.dense:
                values = artifact.quantized(layer).dequantize()
                yield name, as_stored(name, values, model.dtype)
            else:
                tensor = artifact.quantized(layer)
                outer.see(layer, tensor)
                stored = ct.layout_of(tensor.scheme).encode(
                    tensor, input_amax=artifact.input_amax.get(layer)
                )
                del tensor
                for suffix in list(stored):
                    yield f"{layer}.{suffix}", stored.pop(suffix)
        for name, scale in artifact.kv_scales.items():
            yield name, scale.float()

    @property
    def _options(self) -> SafetensorsOptions:
        assert isinstance(self.options, SafetensorsOptions)
        return self.options


def _group_of(folder: Path, layer: str) -> dict[str, Any]:
    """Return the config group that names ``layer``."""
    config = stock_transformers.read_config(folder)
    groups = config.get("quantization_config", {}).get("config_groups", {})
    for group in groups.values():
        if is_target(layer, group["targets"]):
            return dict(group)
    raise CheckpointError(f"{folder}: config.json names no codes of {layer}")
