"""Descriptions and sources of a model that has lost blocks, attention or neurons.

Nothing here looks at values: what is cut was decided before. Tensors are sliced when
they are read, so that a model larger than memory is cut like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from compress.core.artifact import ModelDescription, TensorInfo, TensorSource
from compress.core.errors import CheckpointError
from compress.core.shapes import (
    ATTENTION,
    WIDTHS,
    attention_flags,
    has_widths,
    lacks_attention,
    with_attention,
    with_widths,
)
from compress.pruning.places import MLPPlace, mlp_places

_LISTS_OF_INDICES = ("mlp_only_layers",)
_EXPERT_WIDTH = "moe_intermediate_size"


class RenamedSource(TensorSource):
    """Another source's tensors under other names; those without one are gone."""

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        self._source, self._names = source, names

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor that is left, by its new name."""
        stored = self._source.tensors()
        return {new: stored[old] for new, old in self._names.items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor by its new name."""
        return self._source.read(self._names[name])

    def read_index(self, name: str, index: int) -> Tensor:
        """Return one entry along the first axis."""
        return self._source.read_index(self._names[name], index)


def without_blocks(
    model: ModelDescription, source: TensorSource, dropped: Sequence[int]
) -> tuple[ModelDescription, TensorSource]:
    """Return the model without some blocks; the others are numbered anew.

    Raises:
        CheckpointError: The config places layers by a rule that numbers would break.
    """
    kept = [i for i in range(model.block_count) if i not in set(dropped)]
    if len(kept) == model.block_count:
        return model, source
    if int(model.config.get("decoder_sparse_step") or 1) != 1:
        raise CheckpointError(
            f"{model.label}: decoder_sparse_step places experts by number, so that no "
            "block can be dropped; prune neurons instead (depth_share: 0)"
        )
    names: dict[str, str] = {}
    for new, old in enumerate(kept):
        after, before = (f"{model.family.block(i)}." for i in (new, old))
        for name in model.tensors:
            if name.startswith(before):
                names[after + name.removeprefix(before)] = name
    first = f"{model.family.blocks}."
    outside = {name: name for name in model.tensors if not name.startswith(first)}
    names |= outside
    tensors = {new: model.tensors[old] for new, old in names.items()}
    config = _config_of_blocks(model.config, kept)
    described = replace(model, config=config, tensors=tensors)
    return described, RenamedSource(source, names)


def without_attention(
    model: ModelDescription, source: TensorSource, removed: Sequence[int]
) -> tuple[ModelDescription, TensorSource]:
    """Return the model with blocks that have no attention, nor the norms around it.

    Args:
        model: May have such blocks already.
        source: Its tensors.
        removed: Numbers of blocks.

    Raises:
        CheckpointError: Block 0 is among them.
    """
    if not removed:
        return model, source
    family = model.family
    gone = {f"{family.block(index)}." for index in removed}

    def stays(name: str) -> bool:
        block = next((prefix for prefix in gone if name.startswith(prefix)), None)
        if block is None:
            return True
        return not family.is_attention(name.removeprefix(block).rpartition(".")[0])

    tensors = {name: info for name, info in model.tensors.items() if stays(name)}
    flags = [
        flag and index not in removed
        for index, flag in enumerate(attention_flags(model.config))
    ]
    config = with_attention(model.config, flags)
    described = replace(model, config=config, tensors=tensors)
    return described, RenamedSource(source, {name: name for name in tensors})


def _config_of_blocks(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Return a config whose lists over blocks have the entries of those kept."""
    count = int(config["num_hidden_layers"])
    changed = dict(config)
    changed["num_hidden_layers"] = len(kept)
    for key, value in config.items():
        if key in _LISTS_OF_INDICES and isinstance(value, list):
            changed[key] = [kept.index(i) for i in value if i in kept]
        elif key.endswith("token_id"):
            continue  # several tokens may end a text
        elif isinstance(value, list) and len(value) == count:
            changed[key] = [value[i] for i in kept]
    if lacks_attention(changed):
        changed = with_attention(changed, changed[ATTENTION])
    if has_widths(changed):
        changed = with_widths(changed, changed[WIDTHS])
    return changed


def with_mlp_widths(model: ModelDescription, widths: Sequence[int]) -> ModelDescription:
    """Return the description of a model whose blocks keep so many neurons.

    Raises:
        CheckpointError: Blocks of experts differ, or the config cannot say it.
    """
    present = [mlp_places(model, i)[0].neurons for i in range(model.block_count)]
    if list(widths) == present:
        return model
    tensors = dict(model.tensors)
    for index, width in enumerate(widths):
        for place in mlp_places(model, index):
            tensors |= _cut_shapes(model, place, width)
    return replace(model, config=_widths_in(model, widths), tensors=tensors)


def _widths_in(model: ModelDescription, widths: Sequence[int]) -> dict[str, Any]:
    config = dict(model.config)
    if not any(model.experts(i) for i in range(model.block_count)):
        return with_widths(config, widths)
    if not all(map(model.experts, range(model.block_count))):
        raise CheckpointError(
            f"{model.label}: its config has one width for experts and another for the "
            "blocks without, which cannot be pruned together; prune blocks only"
        )
    if len(set(widths)) > 1:
        raise CheckpointError(
            f"{model.label}: a mixture of experts has one width for all its blocks; "
            "use shape: uniform"
        )
    key = _EXPERT_WIDTH if _EXPERT_WIDTH in config else "intermediate_size"
    return {**config, key: widths[0]}


def _cut_shapes(
    model: ModelDescription, place: MLPPlace, width: int
) -> dict[str, TensorInfo]:
    """Return the tensors of one MLP that change, with their new shapes."""
    found = {}
    count = 2 * width if place.fused else width
    for name in place.rows:
        for kind in ("weight", "bias"):
            info = model.tensors.get(f"{name}.{kind}")
            if info is not None:
                found[f"{name}.{kind}"] = replace(info, shape=(count, *info.shape[1:]))
    down = f"{place.down}.weight"
    info = model.tensors[down]
    found[down] = replace(info, shape=(info.shape[0], width))
    return found


def cut_rows(place: MLPPlace, source: TensorSource, kept: Tensor) -> dict[str, Tensor]:
    """Return gate and up, with their biases, of the neurons that stay, as stored."""
    rows = place.row_indices(kept.cpu())
    stored = source.tensors()
    return {
        f"{name}.{kind}": source.read(f"{name}.{kind}")[rows].contiguous()
        for name in place.rows
        for kind in ("weight", "bias")
        if f"{name}.{kind}" in stored
    }
