"""What exporters see: the description of a model, and the compressed model itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.core.families import Family, Linear, expert_count
from compress.core.plan import Plan
from compress.core.shapes import attention_flags, blocks_differ, heads_fill
from compress.core.statistics import InputSquares
from compress.core.tensors import QuantizedTensor


@dataclass(frozen=True)
class TensorInfo:
    """Shape and storage type (``float32``, ``float16``, ``bfloat16``) of a tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of values."""
        count = 1
        for size in self.shape:
            count *= size
        return count


class TensorSource(ABC):
    """Dense tensors of a checkpoint, read one at a time, by transformers' names."""

    @abstractmethod
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor in checkpoint order; reads no data."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU, in its storage type; the caller owns it."""

    def read_index(self, name: str, index: int) -> Tensor:
        """Return one entry along the first axis; sources that can read no more."""
        return self.read(name)[index].clone()


@dataclass(frozen=True)
class ModelDescription:
    """All that is known about a model before a weight is read.

    Attributes:
        label: What the user called it.
        config: The transformers config as plain data.
        family: Row of the family table.
        tensors: Every stored tensor by name. Tied heads are not listed.
        dtype: Storage type of the model: float32, float16 or bfloat16.
        tied: Whether the head shares the embedding's weight.
        assets: Folder with tokenizer files, generation config and chat template.
        source_gguf: The GGUF file that the model was read from, if it was.
        transforms: Exact reparametrisations that its weights went through, in order.
    """

    label: str
    config: Mapping[str, Any]
    family: Family
    tensors: Mapping[str, TensorInfo]
    dtype: str
    tied: bool
    assets: Path | None = None
    source_gguf: Path | None = None
    transforms: tuple[str, ...] = ()

    @property
    def block_count(self) -> int:
        """Number of decoder blocks."""
        return int(self.config["num_hidden_layers"])

    @property
    def gguf_architecture(self) -> str | None:
        """Name in GGUF if our own writer knows such models."""
        family, config = self.family, self.config
        if blocks_differ(config) or (family.gguf_heads_fill and not heads_fill(config)):
            return family.gguf_uneven_architecture
        return family.gguf_architecture

    def has_attention(self, index: int) -> bool:
        """Whether block ``index`` has attention."""
        return attention_flags(self.config)[index]

    def experts(self, index: int) -> int:
        """Number of experts of block ``index``; 0 where its MLP is an ordinary one."""
        gate = f"{self.family.block(index)}.mlp.gate_proj.weight"
        if self.family.experts is None or gate in self.tensors:
            return 0
        return expert_count(self.config)

    def block_linears(self, index: int) -> tuple[Linear, ...]:
        """Return the quantizable layers of block ``index``, in order of execution."""
        found = self.family.block_linears(self.experts(index))
        if self.has_attention(index):
            return found
        return tuple(x for x in found if not self.family.is_attention(x.path))

    def linears(self) -> list[str]:
        """Full names of all quantizable layers of all blocks, in model order."""
        return [
            f"{self.family.block(index)}.{linear.path}"
            for index in range(self.block_count)
            for linear in self.block_linears(index)
        ]


@dataclass(frozen=True)
class CompressedModel:
    """A plan carried out: dense tensors plus codes for the layers of the plan.

    Attributes:
        description: The model before compression.
        plan: One entry for each coded matrix.
        source: The dense tensors, read lazily.
        quantized: Returns the codes of a layer of the plan, by module name.
        provenance: Versions, seed, command and hashes, for model cards and metadata.
        kv_scales: Static scales of the key-value cache, by the name of the tensor that
            holds them (``model.layers.0.self_attn.k_scale``): float32 ``[1]``, or
            ``[heads, 1, 1]`` for a scale a head.
        kv_cache_scheme: How the cache is quantized, as the ``kv_cache_scheme`` entry of
            a compressed-tensors config; ``None`` leaves the cache alone.
        input_amax: Largest magnitude of the inputs of a layer, by layer name, as
            calibration measured it; needed by schemes whose inputs have a static outer
            scale (``nvfp4-w4a4``).
        input_squares: Runs calibration text through the dense model and returns what it
            showed; for exporters with ``needs_input_squares``.
    """

    description: ModelDescription
    plan: Plan
    source: TensorSource
    quantized: Callable[[str], QuantizedTensor]
    provenance: Mapping[str, str] = field(default_factory=dict)
    kv_scales: Mapping[str, Tensor] = field(default_factory=dict)
    kv_cache_scheme: Mapping[str, Any] | None = None
    input_amax: Mapping[str, float] = field(default_factory=dict)
    input_squares: Callable[[], InputSquares] | None = None
