"""Repacks a GGUF template: its metadata and tensors, with our codes put in.

Works for every architecture that llama.cpp's converter knows, because everything but
the layers of the plan is copied byte for byte. How the converter turned a weight of
transformers into the template's tensor (as it is, or with interleaved q and k rows) is
not assumed: the template's own tensor has to equal the transformed original within the
rounding of its type before codes take its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from compress.core.artifact import CompressedModel, ModelDescription, TensorSource
from compress.core.contracts import Problem
from compress.core.errors import CheckpointError, ExportError
from compress.core.plan import Plan
from compress.export.gguf_blocks import holds_columns, row_bytes
from compress.export.gguf_float_blocks import applies_factor
from compress.export.gguf_layout import (
    Layout,
    Placement,
    layer_type,
    missing_layers,
    unheld,
    with_factors,
)
from compress.export.gguf_names import heads_of_role, name_finder, to_gguf_rows
from compress.export.gguf_reader import GGUFFile, MetadataValue, open_gguf

# Half a unit in the last place, relative, of types that a template may hold.
_ROUNDING = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
_MODEL_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_SMALLEST_F16 = 2.0**-24


def open_template(path: str) -> GGUFFile:
    """Return the template's metadata and tensor table.

    Raises:
        ExportError: The file cannot be read.
    """
    try:
        return open_gguf(Path(path))
    except CheckpointError as error:
        raise ExportError(f"template {error}") from error


def template_layout(
    plan: Plan,
    model: ModelDescription,
    *,
    template: GGUFFile,
    embedding: str | None,
    reencode: str | None,
) -> Layout:
    """Return how each tensor of the template is written.

    Args:
        plan: Its layers replace tensors of the template.
        model: The model that the plan belongs to.
        template: Holds dense weights (F32, F16 or BF16) for all layers of the plan.
        embedding: Type for the embedding and the head; ``None`` copies them.
        reencode: Type of layers whose codes GGUF cannot hold, or ``None``.
    """
    sources = _sources(template, model)
    ends = {f"{model.family.embedding}.weight", f"{model.family.head}.weight"}
    placements: list[Placement] = []
    problems: list[Problem] = []
    notes: list[str] = []
    for target, stored in template.tensors.items():
        source = sources.get(target)
        layer = plan.layers.get((source or "").removesuffix(".weight"))
        copied = Placement(source, target, stored.type, stored.shape, stored.size_bytes)
        if layer is not None:
            biased = f"{layer.name}.bias" in model.tensors
            factor = applies_factor(template.architecture, target, biased=biased)
            kind, exact = layer_type(layer, reencode, factor=factor)
            problem = _layer_problem(template, target, layer.shape)
            if kind is None or problem:
                where = Problem(layer.name, problem or "")
                problems.append(where if problem else unheld(layer, reencode))
                continue
            size = row_bytes(kind, stored.shape[-1]) * stored.shape[0]
            copied = replace(
                copied, type=kind, size_bytes=size, layer=layer.name, is_exact=exact
            )
            if not exact:
                notes.append(f"{source}: {layer.scheme.name} re-encoded as {kind}")
        elif embedding is not None and source in ends:
            columns = stored.shape[-1]
            kind = embedding if holds_columns(embedding, columns) else "f16"
            size = row_bytes(kind, columns) * stored.shape[0]
            copied = replace(copied, type=kind, size_bytes=size)
        placements += with_factors(copied)
    problems += missing_layers(
        plan, [(name or "").removesuffix(".weight") for name in sources.values()]
    )
    return Layout(tuple(placements), tuple(problems), tuple(notes))


def template_metadata(template: GGUFFile) -> dict[str, MetadataValue]:
    """Return the template's metadata without what only its own file is described by."""
    return {
        key: value
        for key, value in template.metadata.items()
        if not key.startswith(("split.", "general.quantized_by"))
    }


def with_rotary_heads(
    placements: tuple[Placement, ...], artifact: CompressedModel, template: GGUFFile
) -> tuple[Placement, ...]:
    """Return the placements with the heads whose rows the template interleaves.

    Raises:
        ExportError: A tensor of the template is not the model's weight.
    """
    model, source = artifact.description, artifact.source
    return tuple(
        placement
        if placement.layer is None
        else replace(
            placement,
            heads=rotary_heads_of(template, placement, model=model, source=source),
        )
        for placement in placements
    )


def rotary_heads_of(
    template: GGUFFile,
    placement: Placement,
    *,
    model: ModelDescription,
    source: TensorSource,
) -> int:
    """Return how many heads' rows the template interleaves in a layer; 0 for none.

    Raises:
        ExportError: The template's tensor is not this weight of the model.
    """
    assert placement.source is not None and placement.layer is not None
    original = source.read(placement.source).float()
    stored = torch.from_numpy(template.read_values(placement.target))
    kind = template.tensors[placement.target].type
    rounding = max(_ROUNDING[kind], _MODEL_ROUNDING[model.dtype])
    roles = {linear.path: linear.role for linear in model.family.linears}
    path = placement.layer.removeprefix(f"{model.family.blocks}.").partition(".")[2]
    heads = heads_of_role(roles.get(path, ""), model.config)
    for candidate in dict.fromkeys((0, heads)):
        if _is_close(stored, to_gguf_rows(original, candidate), rounding):
            return candidate
    raise ExportError(
        f"template {template.path}: {placement.target} is not {placement.source} of "
        f"{model.label}; give a template made from the same weights"
    )


def _is_close(stored: Tensor, original: Tensor, rounding: float) -> bool:
    allowed = original.abs() * rounding + _SMALLEST_F16
    return bool(((stored - original).abs() <= allowed).all())


def _sources(template: GGUFFile, model: ModelDescription) -> Mapping[str, str]:
    """Return transformers' names by the template's tensor names."""
    try:
        find = name_finder(template.architecture, model.block_count)
    except KeyError:
        raise ExportError(
            f"template {template.path}: the installed gguf package does not know the "
            f"architecture {template.architecture!r}; update it (pip install -U gguf)"
        ) from None
    named = ((find(name), name) for name in model.tensors)
    return {
        target: name
        for target, name in named
        if target is not None and target in template.tensors
    }


def _layer_problem(
    template: GGUFFile, target: str, shape: tuple[int, int]
) -> str | None:
    stored = template.tensors[target]
    if stored.shape != shape:
        return (
            f"template {template.path}: {target} is {list(stored.shape)}, the layer "
            f"{list(shape)}; give a template of the same model"
        )
    if stored.type not in _ROUNDING:
        return (
            f"template {template.path}: {target} is {stored.type.upper()}, which "
            "cannot be compared with the original weight; give an F16, BF16 or F32 one"
        )
    return None
