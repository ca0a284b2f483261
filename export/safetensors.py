"""Safetensors checkpoint that stock transformers and vLLM load.

Coded layers are stored as compressed-tensors ``pack-quantized`` (the codes exactly as
the quantizer chose them), everything else dense in the model's type; config, tokenizer
and model card lie beside. A plan without layers gives an ordinary dense checkpoint.

Source: compressed-tensors 0.20 (``pack_quantized``, ``QuantizationConfig``) and the
loaders of transformers 5.23. What we do differently: every layer is named in its config
group instead of matched by class, so that a config group never covers a layer that has
no codes, and files are streamed (see ``sharding``). Limits: no float minima; integer
zero points only if the whole plan is one scheme, see :meth:`SafetensorsExporter.check`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import field_validator
from torch import Tensor

from compress.core import pack_quantized
from compress.core.artifact import CompressedModel, ModelDescription, TensorInfo
from compress.core.contracts import Exporter, ExportResult, Options, Problem
from compress.core.errors import (
    CheckpointError,
    ExportError,
    MissingDependencyError,
    SchemeError,
)
from compress.core.plan import LayerPlan, Plan
from compress.core.scheme import Zero
from compress.core.tensors import TORCH_DTYPES, QuantizedTensor
from compress.export.dense_form import decoded
from compress.export.experts import expert_layers, expert_problems, is_target
from compress.export.hf_files import (
    as_json,
    copy_assets,
    generation_config,
    model_config,
)
from compress.export.model_card import groups_of, model_card
from compress.export.sharding import (
    Entry,
    parse_size,
    plan_shards,
    read_tensor,
    write_shards,
)

_LOG = logging.getLogger(__name__)


class SafetensorsOptions(Options):
    """Options of the safetensors exporter.

    Attributes:
        max_shard_size: Largest file, such as ``5GB`` or ``500MiB``; a single tensor
            that is larger gets a file of its own.
        dense: Write decoded weights in the model's type instead of codes: not smaller
            than the base model, but any reader loads it, whatever the plan.
    """

    max_shard_size: str = "5GB"
    dense: bool = False

    @field_validator("max_shard_size", mode="before")
    @classmethod
    def _is_size(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str):
            parse_size(value)
        return value


class SafetensorsExporter(Exporter):
    """Writes ``pack-quantized`` safetensors with config, tokenizer and card."""

    name = "safetensors"
    summary = "compressed-tensors pack-quantized checkpoint for transformers"
    source = "compressed-tensors 0.20, pack-quantized layout"
    consumer = "transformers"
    Options = SafetensorsOptions

    def check(self, plan: Plan, model: ModelDescription) -> list[Problem]:
        """List what cannot be stored, or what stock transformers cannot load back."""
        if self._options.dense:
            return []
        problems = expert_problems(plan, model) + [
            Problem(name, message)
            for name, layer in plan.layers.items()
            if (message := _layer_problem(layer, model)) is not None
        ]
        schemes = groups_of(plan.layers)
        if len(schemes) > 1:
            # transformers 5.23 reads an asymmetric layer only with dequantize=True, and
            # there it decodes every layer with the first group's bits.
            problems += [
                Problem(
                    names[0],
                    f"{scheme.name} beside other schemes: stock transformers loads "
                    "integer zero points only if the whole plan is one scheme; use "
                    f"int{scheme.bits} without -asym, or {scheme.name} everywhere",
                )
                for scheme, names in schemes.items()
                if scheme.zero is Zero.INTEGER
            ]
        return problems

    def notes(self, plan: Plan, model: ModelDescription) -> tuple[str, ...]:
        """Return what a user of the files should know; none of it stops an export."""
        layers = plan.layers.values()
        if self._options.dense:
            return (f"Decoded weights in {model.dtype}: no smaller than the base.",)
        notes = []
        if any(layer.scheme.zero is Zero.INTEGER for layer in layers):
            notes.append(
                "Integer zero points: load in transformers with "
                "CompressedTensorsConfig(dequantize=True); its default load fails. The "
                "product with the scale is then computed in the scale's type."
            )
        scales = sorted({layer.scheme.scale_dtype for layer in layers} - {model.dtype})
        if scales:
            notes.append(
                f"Scales are {', '.join(scales)} in a {model.dtype} model; vLLM and "
                f"transformers round them to the type they load in ({model.dtype})."
            )
        odd = sorted({layer.scheme.bits for layer in layers} - {2, 4, 8})
        if odd:
            notes.append(
                f"Codes of {', '.join(map(str, odd))} bits need compressed-tensors "
                "0.20 or newer: releases before 0.18 pack them differently."
            )
        if model.family.head in plan.layers:
            notes.append(
                f"{model.family.head} is coded; transformers loads it, not every "
                "release of vLLM does."
            )
        bits = {
            plan.layers[name].scheme.bits
            for name in expert_layers(model)
            if name in plan.layers
        }
        if bits - {4, 8}:
            notes.append(
                f"Experts have {', '.join(map(str, sorted(bits)))} bits; transformers "
                "loads them, vLLM knows experts of 4 and 8 bits only."
            )
        split = _split_inputs(plan, model)
        if split:
            notes.append(
                f"vLLM fuses {split}, which have different schemes here, and will not "
                "load them; transformers does."
            )
        return tuple(notes)

    def tensor_bytes(self, plan: Plan, model: ModelDescription) -> Mapping[str, int]:
        """Return the bytes of each coded layer, and of each other tensor."""
        stored = replace(plan, layers={}) if self._options.dense else plan
        return {
            name: sum(entry.size_bytes for entry in entries)
            for name, entries in _layout(stored, model).items()
        }

    def write(self, artifact: CompressedModel, folder: Path) -> ExportResult:
        """Write weights one layer at a time, then config, tokenizer and card.

        Raises:
            ExportError: A tensor overflows the model's type, or a file cannot be
                written.
        """
        if self._options.dense:
            artifact = decoded(artifact)
        plan, model = artifact.plan, artifact.description
        entries = [e for part in _layout(plan, model).values() for e in part]
        limit = parse_size(self._options.max_shard_size)
        shards = plan_shards(entries, limit)
        files = write_shards(folder, shards, _tensors(artifact))
        weights = [folder / shard.file for shard in shards]
        size = sum(path.stat().st_size for path in weights)
        notes = self.notes(plan, model)
        card = model_card(artifact, size_bytes=size, notes=notes)
        texts = {"config.json": as_json(model_config(plan, model)), "README.md": card}
        generation = generation_config(model)
        if generation:
            texts["generation_config.json"] = generation
        try:
            for name, text in texts.items():
                (folder / name).write_text(text, "utf-8")
            copied = copy_assets(model.assets, folder)
        except OSError as error:
            raise ExportError(
                f"{folder}: cannot write: {error.strerror or error}; "
                "free some space and continue with --resume, or choose another folder"
            ) from error
        others = tuple(folder / name for name in texts)
        return ExportResult((*files, *others, *copied), size, notes)

    def read_codes(self, folder: Path, layer: str) -> QuantizedTensor:
        """Decode one layer from the written files with our own reader.

        Raises:
            CheckpointError: The folder holds no codes of ``layer``.
        """
        arguments = _arguments_of(folder, layer)
        suffixes = ["weight_packed", "weight_scale", "weight_shape"]
        if not arguments["symmetric"]:
            suffixes.append("weight_zero_point")
        stored = {s: read_tensor(folder, f"{layer}.{s}") for s in suffixes}
        dtype = str(stored["weight_scale"].dtype).removeprefix("torch.")
        scheme = pack_quantized.scheme_of_arguments(arguments, dtype)
        return pack_quantized.decode(stored, scheme)

    def replay(self, folder: Path, windows: Tensor) -> Iterator[Tensor]:
        """Run the files in stock transformers, in float32 on the CPU.

        With integer zero points the model is loaded with ``dequantize=True``.

        Raises:
            MissingDependencyError: compressed-tensors is not installed.
        """
        model = _stock_model(folder)
        for window in windows:
            with torch.inference_mode():
                logits: Tensor = model(window[None].long(), use_cache=False).logits[0]
            yield logits.float()

    @property
    def _options(self) -> SafetensorsOptions:
        assert isinstance(self.options, SafetensorsOptions)
        return self.options


def _layer_problem(layer: LayerPlan, model: ModelDescription) -> str | None:
    """Return why one layer cannot be stored, with the remedy."""
    info = model.tensors.get(f"{layer.name}.weight")
    if info is None:
        tied = " (the head shares the embedding's weight)" if model.tied else ""
        return f"the model stores no {layer.name}.weight{tied}; remove it from the plan"
    if layer.name == model.family.embedding:
        # transformers 5.17 and 5.23 with compressed-tensors 0.19 and 0.20 stop with
        # "'Embedding' object has no attribute 'weight'" when the codes replace it.
        return (
            f"stock transformers cannot load a coded embedding ({layer.scheme.name}); "
            "remove its override so that it stays dense, or export to gguf only"
        )
    if info.shape != layer.shape:
        return f"the plan says {layer.shape}, the model {info.shape}; plan it again"
    if not layer.scheme.is_integer or layer.scheme.inputs or layer.scheme.rank:
        return f"{layer.scheme.name} has no layout here; use an integer scheme"
    if layer.scheme.zero is Zero.OFFSET:
        base = f"int{layer.scheme.bits}"
        group = f"-g{layer.scheme.group_size}" if layer.scheme.group_size else ""
        return (
            f"pack-quantized holds no float minimum ({layer.scheme.name}); use "
            f"{base}{group} or {base}{group}-asym, or export to gguf only"
        )
    try:
        layer.scheme.check_columns(layer.shape[1], layer.name)
    except SchemeError as error:
        return str(error)
    return None


def _split_inputs(plan: Plan, model: ModelDescription) -> str | None:
    """Return the first layers that share an input but not a scheme."""
    for index in range(model.block_count):
        schemes: dict[str, dict[str, Any]] = {}
        for linear in model.block_linears(index):
            layer = plan.layers.get(f"{model.family.block(index)}.{linear.path}")
            scheme = layer.scheme if layer else None
            schemes.setdefault(linear.input, {})[linear.path] = scheme
        for members in schemes.values():
            if len(set(members.values())) > 1:
                return f"{', '.join(members)} of {model.family.block(index)}"
    return None


def _layout(plan: Plan, model: ModelDescription) -> dict[str, list[Entry]]:
    """Return the stored tensors of each layer or tensor, in checkpoint order."""
    layout: dict[str, list[Entry]] = {}
    for name, info in model.tensors.items():
        layer = plan.layers.get(name.removesuffix(".weight"))
        if layer is None or not name.endswith(".weight"):
            layout[name] = [Entry(name, TensorInfo(info.shape, model.dtype))]
            continue
        stored = pack_quantized.stored_tensors(layer.scheme, layer.shape)
        layout[layer.name] = [Entry(f"{layer.name}.{s}", i) for s, i in stored.items()]
    return layout


def _tensors(artifact: CompressedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield what :func:`_layout` describes, holding one layer at a time."""
    model = artifact.description
    for name in model.tensors:
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in artifact.plan.layers:
            stored = pack_quantized.encode(artifact.quantized(layer))
            for suffix in list(stored):
                yield f"{layer}.{suffix}", stored.pop(suffix)
        else:
            yield name, _cast(name, artifact.source.read(name), model.dtype)


def _cast(name: str, tensor: Tensor, dtype: str) -> Tensor:
    if str(tensor.dtype) == f"torch.{dtype}":
        return tensor
    cast = tensor.to(TORCH_DTYPES[dtype])
    if not torch.equal(cast.isfinite(), tensor.isfinite()):
        raise ExportError(
            f"{name}: values up to {tensor.abs().max().item():.3g} do not fit {dtype}; "
            "set model.dtype to bfloat16 or float32"
        )
    return cast


def _arguments_of(folder: Path, layer: str) -> dict[str, Any]:
    """Return the ``weights`` entry of the config group that names ``layer``."""
    config = _read_config(folder)
    groups = config.get("quantization_config", {}).get("config_groups", {})
    for group in groups.values():
        if is_target(layer, group["targets"]):
            return dict(group["weights"])
    raise CheckpointError(f"{folder}: config.json names no codes of {layer}")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from error
    return config


def _stock_model(folder: Path) -> Any:
    """Load the folder as any user of transformers would."""
    from transformers import AutoModelForCausalLM

    quantization = _read_config(folder).get("quantization_config")
    options: dict[str, Any] = {}
    if quantization:
        try:
            import compressed_tensors  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError(
                "compressed-tensors", extra="verify", purpose="loading this checkpoint"
            ) from error
        groups = quantization["config_groups"].values()
        if not all(group["weights"]["symmetric"] for group in groups):
            from transformers import CompressedTensorsConfig

            _LOG.info("integer zero points: loading with dequantize=True")
            options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    with _no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, **options
        ).eval()
        for parameter in model.parameters():
            if parameter.is_floating_point():  # 5.17 decodes experts in their scales'
                parameter.data = parameter.data.float()
        with torch.inference_mode():  # the first forward pass unpacks all codes
            model(torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    return model


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep the bars of the loading libraries out of the output of ours.

    They show one bar for each stage, some of which no option switches off.
    """
    from tqdm import tqdm

    original = tqdm.__init__

    def silent(bar: Any, *values: Any, **options: Any) -> None:
        original(bar, *values, **{**options, "disable": True})

    tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.__init__ = original
