"""GGUF files as input models: dense tensors by transformers' names, read lazily.

For ``llama`` (also mistral, mixtral), ``qwen2``, ``qwen3`` and ``qwen3moe`` a tensor is
read from its place in the file, each expert of a stacked one alone, decoded in runs of
rows, and put back into transformers' row order; the values are those of transformers'
own GGUF loader, cast to the same type. Any other architecture takes the documented
detour through that loader, with the whole model in memory and a warning.

What was stored in few bits comes back as those few values: compressing such a model is
re-quantising, and a warning says so.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.core.artifact import TensorInfo, TensorSource
from compress.core.errors import CheckpointError
from compress.core.families import Family, Linear, expert_count, family_of
from compress.core.shapes import attention_flags
from compress.core.tensors import TORCH_DTYPES
from compress.export.gguf_float_blocks import scale_name
from compress.export.gguf_metadata import ROPE_TENSOR
from compress.export.gguf_names import from_gguf_rows, name_finder, rotary_heads
from compress.export.gguf_reader import GGUFFile, open_gguf
from compress.model.gguf_config import KNOWN_ARCHITECTURES, gguf_dtype, read_gguf_config

_log = logging.getLogger(__name__)
_CHUNK_ELEMENTS = 1 << 22  # 16 MiB of float32 while a tensor is decoded
_FINE_TYPES = frozenset({"f64", "f32", "f16", "bf16", "q8_0"})


class GGUFSource(TensorSource):
    """Dense tensors of a GGUF file.

    Attributes:
        dtype: Type of every tensor it returns: bfloat16 if the file holds BF16, float32
            if all its matrices are F32, else float16.
    """

    def __init__(self, path: Path) -> None:
        """Read the header of ``path`` and check it against the size of the file.

        Raises:
            CheckpointError: Missing, cut short, damaged, not GGUF, or tensors do not
                make up a model of its architecture.
        """
        self._file = open_gguf(path)
        self.dtype = gguf_dtype(self._file)
        _warn_if_coarse(self._file)
        self._whole: dict[str, Tensor] | None = None
        self._places: dict[str, _Place] = {}
        if self._file.architecture in KNOWN_ARCHITECTURES:
            self._places = _places(self._file)
        else:
            self._whole = _load_whole(self._file, TORCH_DTYPES[self.dtype])

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor in the order of transformers' model."""
        if self._whole is not None:
            return {
                name: TensorInfo(tuple(tensor.shape), self.dtype)
                for name, tensor in self._whole.items()
            }
        return {
            name: TensorInfo(self._shape(place), self.dtype)
            for name, place in self._places.items()
        }

    def read(self, name: str) -> Tensor:
        """Return one tensor, decoded, in :attr:`dtype`.

        Raises:
            CheckpointError: No such tensor, or its type cannot be decoded.
        """
        if self._whole is not None and name in self._whole:
            return self._whole[name].clone()
        if name not in self._places:
            raise CheckpointError(f"{self._file.path}: tensor {name} is missing")
        place = self._places[name]
        shape = self._shape(place)
        tensor = torch.empty(shape, dtype=TORCH_DTYPES[self.dtype])
        rows = tensor.view(-1, shape[-1])
        step = max(1, _CHUNK_ELEMENTS // shape[-1])
        first = (place.expert or 0) * len(rows)
        factor = self._file.factor(place.target, place.expert or 0)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            values = self._file.read_values(
                place.target, start=first + start, count=len(part)
            )
            if factor != 1:
                values = values * factor
            part.copy_(torch.from_numpy(values))
        return from_gguf_rows(tensor, place.heads)

    def _shape(self, place: _Place) -> tuple[int, ...]:
        shape = self._file.tensors[place.target].shape
        return shape if place.expert is None else shape[1:]


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: GGUF name, interleaved heads, entry of a stack."""

    target: str
    heads: int
    expert: int | None = None


def _places(file: GGUFFile) -> dict[str, _Place]:
    """Return where each tensor lies, by the name that checkpoints give it."""
    config = read_gguf_config(file.path)
    family = family_of(str(config["model_type"]))
    blocks = int(config["num_hidden_layers"])
    find = name_finder(file.architecture, blocks)
    places: dict[str, _Place] = {}
    for name, is_required in _candidates(family, config):
        expert, stack = _stack_of(name, family)
        target = find(stack)
        assert target is not None, f"gguf has no name for {name}"
        if target in file.tensors:
            heads = rotary_heads(
                file.architecture, family, config, name.rpartition(".")[0]
            )
            places[name] = _Place(target, heads, expert)
        elif is_required:
            raise CheckpointError(
                f"{file.path}: tensor {target} ({name}) is missing from this "
                f"{file.architecture} file; fetch or convert it again"
            )
    targets = {place.target for place in places.values()}
    factors = {scale_name(n) for n in targets if file.tensors[n].type == "nvfp4"}
    strange = set(file.tensors) - targets - factors
    strange.discard(ROPE_TENSOR)
    if strange:
        raise CheckpointError(
            f"{file.path}: {len(strange)} tensors are no part of a plain "
            f"{family.name} model, such as {min(strange)}; this variant is not "
            "supported"
        )
    return places


def _candidates(family: Family, config: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Return tensor names of a family and whether each must be there."""
    names = [f"{family.embedding}.weight"]
    for index, attends in enumerate(attention_flags(config)):
        block = family.block(index)
        for linear in family.block_linears(expert_count(config)):
            if not attends and family.is_attention(linear.path):
                continue
            names.append(f"{block}.{linear.path}.weight")
            if _has_bias(linear, family, config):
                names.append(f"{block}.{linear.path}.bias")
        names += [
            f"{block}.{norm}.weight"
            for norm in family.norms
            if attends or not family.is_attention(norm)
        ]
        if family.experts is not None:
            names.append(f"{block}.{family.experts.mlp}.gate.weight")
    names.append(f"{family.final_norm}.weight")
    head = f"{family.head}.weight"
    return [*((name, True) for name in names), (head, False)]


def _stack_of(name: str, family: Family) -> tuple[int | None, str]:
    """Return the number of a tensor's expert, and the name without it."""
    if family.experts is None:
        return None, name
    container = f".{family.experts.container}."
    block, inside, rest = name.partition(container)
    number, _, leaf = rest.partition(".")
    return (int(number), f"{block}{container}{leaf}") if inside else (None, name)


def _has_bias(linear: Linear, family: Family, config: Mapping[str, Any]) -> bool:
    if not linear.path.startswith("self_attn."):
        return bool(config.get("mlp_bias", False))
    if family.name == "qwen2":
        return linear.role in ("q", "k", "v")
    return bool(config.get("attention_bias", False))


def _load_whole(file: GGUFFile, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return all tensors through transformers' loader."""
    from transformers import AutoModelForCausalLM

    _log.warning(
        "%s: architecture %s is read by transformers, with the whole model in memory",
        file.path,
        file.architecture,
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.path.parent, gguf_file=file.path.name, dtype=dtype
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointError(
            f"{file.path}: transformers cannot read architecture "
            f"{file.architecture!r} from GGUF ({error}); use the original model folder"
        ) from error
    # named_parameters lists a tied weight once, as a checkpoint does.
    return {name: p.detach() for name, p in model.named_parameters()}


def _warn_if_coarse(file: GGUFFile) -> None:
    kinds = {t.type for t in file.tensors.values() if len(t.shape) > 1} - _FINE_TYPES
    if kinds:
        _log.warning(
            "%s holds %s: already quantised; to compress it again, the original "
            "checkpoint gives better results",
            file.path,
            ", ".join(sorted(kind.upper() for kind in kinds)),
        )
