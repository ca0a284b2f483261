"""Model families: where blocks, linears, norms, shared inputs and slice groups are.

One row a family. Paths are relative to a decoder block unless they say otherwise, and
are those of the checkpoint. transformers' module tree has the same ones, except where
it stacks the experts of a mixture; ``model/experts.py`` bridges that.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.core.errors import CheckpointError


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block.

    Attributes:
        path: Module path inside the block.
        role: q, k, v, o, qkv, gate, up, gate_up or down.
        input: Name of its input; layers with the same input share statistics.
        expert: Number of the expert that it belongs to; ``None`` outside a mixture.
    """

    path: str
    role: str
    input: str
    expert: int | None = None


@dataclass(frozen=True)
class SliceGroup:
    """Rows and columns that must be cut together.

    Attributes:
        unit: What one cut removes: ``neuron`` or ``kv_group``.
        rows: Linears that lose rows.
        columns: Linears that lose columns.
        layout: ``plain``; ``halves`` when a fused matrix stacks two parts; ``qkv`` when
            one stacks queries, keys and values.
    """

    unit: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    layout: str = "plain"


@dataclass(frozen=True)
class Experts:
    """How checkpoints name the parts of a mixture of experts.

    Attributes:
        mlp: Path of the mixture inside a block, in checkpoints.
        gate: Name of an expert's gate matrix, ``[I, H]``.
        up: Name of its up matrix, ``[I, H]``.
        down: Name of its down matrix, ``[H, I]``.
    """

    mlp: str
    gate: str
    up: str
    down: str

    @property
    def container(self) -> str:
        """Path of the experts inside a block; each is a number below it."""
        return f"{self.mlp}.experts"

    def linears(self, count: int) -> tuple[Linear, ...]:
        """Return the layers of ``count`` experts; gate and up of one share an input."""
        found: list[Linear] = []
        for number in range(count):
            path = f"{self.container}.{number}"
            found += (
                Linear(f"{path}.{self.gate}", "gate", path, number),
                Linear(f"{path}.{self.up}", "up", path, number),
                Linear(f"{path}.{self.down}", "down", f"{path}.{self.down}", number),
            )
        return tuple(found)


@dataclass(frozen=True)
class Family:
    """Everything the toolkit knows about one kind of decoder.

    Attributes:
        name: Family name for messages.
        model_types: ``model_type`` values of transformers configs.
        linears: Quantizable layers of a block, in order of execution; without the MLP
            where that can be a mixture of experts, see :meth:`block_linears`.
        norms: Norms of a block.
        slice_groups: What structured pruning may cut.
        experts: How experts are named, if the MLP can be a mixture of them.
        norm_offset: 1 where norms multiply by ``1 + weight``.
        gguf_architecture: Name in GGUF if our own writer knows the family.
        gguf_uneven_architecture: The one that holds blocks of different widths, if one
            computes the same.
        gguf_heads_fill: Whether ``gguf_architecture`` takes only heads that together
            are as wide as the model; others need the uneven one.
        attention_norm: Norm that feeds the linears with input ``attention``.
        mlp_norm: Norm that feeds the linears with input ``mlp``.
        output_norms: Norms between a sub-layer and the residual stream, attention's
            first.
        attention: Path of the attention inside a block.
    """

    name: str
    model_types: tuple[str, ...]
    linears: tuple[Linear, ...]
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    slice_groups: tuple[SliceGroup, ...] = ()
    experts: Experts | None = None
    norm_offset: int = 0
    gguf_architecture: str | None = None
    gguf_uneven_architecture: str | None = None
    gguf_heads_fill: bool = False
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    output_norms: tuple[str, ...] = ()
    attention: str = "self_attn"
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def attention_norms(self) -> tuple[str, ...]:
        """Norms of a block that only its attention uses, besides those inside it."""
        return (self.attention_norm, *self.output_norms[:1])

    def is_attention(self, path: str) -> bool:
        """Whether a path inside a block is part of what goes with its attention."""
        return path.startswith(f"{self.attention}.") or path in self.attention_norms

    def block(self, index: int) -> str:
        """Full path of decoder block ``index``."""
        return f"{self.blocks}.{index}"

    def block_linears(self, experts: int) -> tuple[Linear, ...]:
        """Return the layers of one block, in order of execution.

        Args:
            experts: How many the block has; 0 where its MLP is an ordinary one.
        """
        if self.experts is None:
            return self.linears
        mlp = self.experts.linears(experts) if experts else _GATED_MLP
        return self.linears + mlp

    def readers(self, shared: str) -> tuple[str, ...]:
        """Paths of the linears that read the input named ``shared``."""
        return tuple(linear.path for linear in self.linears if linear.input == shared)

    def with_role(self, *roles: str) -> Linear | None:
        """The linear of a block that has one of ``roles``; ``None`` if none has."""
        for linear in self.linears:
            if linear.role in roles:
                return linear
        return None


_ATTENTION = (
    Linear("self_attn.q_proj", "q", "attention"),
    Linear("self_attn.k_proj", "k", "attention"),
    Linear("self_attn.v_proj", "v", "attention"),
    Linear("self_attn.o_proj", "o", "attention_output"),
)
_GATED_MLP = (
    Linear("mlp.gate_proj", "gate", "mlp"),
    Linear("mlp.up_proj", "up", "mlp"),
    Linear("mlp.down_proj", "down", "mlp_output"),
)
_PLAIN = _ATTENTION + _GATED_MLP
_HEADS = SliceGroup(
    "kv_group",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
)
_PLAIN_SLICES = (
    SliceGroup("neuron", ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
    _HEADS,
)
_GEMMA_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_GEMMA_OUTPUT_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        ("llama",),
        _PLAIN,
        slice_groups=_PLAIN_SLICES,
        gguf_architecture="llama",
        gguf_uneven_architecture="deci",
    ),
    Family(
        "mistral",
        ("mistral",),
        _PLAIN,
        slice_groups=_PLAIN_SLICES,
        gguf_architecture="llama",
        gguf_uneven_architecture="deci",
    ),
    Family("smollm3", ("smollm3",), _PLAIN, slice_groups=_PLAIN_SLICES),
    Family(
        "qwen2",
        ("qwen2",),
        _PLAIN,
        slice_groups=_PLAIN_SLICES,
        gguf_architecture="qwen2",
        gguf_uneven_architecture="deci",
        gguf_heads_fill=True,
    ),
    Family(
        "qwen3",
        ("qwen3",),
        _PLAIN,
        norms=("input_layernorm", "post_attention_layernorm", *_QK_NORMS),
        slice_groups=_PLAIN_SLICES,
        gguf_architecture="qwen3",
    ),
    Family(
        "gemma2",
        ("gemma2",),
        _PLAIN,
        norms=_GEMMA_NORMS,
        slice_groups=_PLAIN_SLICES,
        norm_offset=1,
        mlp_norm="pre_feedforward_layernorm",
        output_norms=_GEMMA_OUTPUT_NORMS,
    ),
    Family(
        "gemma3",
        ("gemma3_text",),
        _PLAIN,
        norms=(*_GEMMA_NORMS, *_QK_NORMS),
        slice_groups=_PLAIN_SLICES,
        norm_offset=1,
        mlp_norm="pre_feedforward_layernorm",
        output_norms=_GEMMA_OUTPUT_NORMS,
    ),
    Family(
        "phi3",
        ("phi3",),
        (
            Linear("self_attn.qkv_proj", "qkv", "attention"),
            Linear("self_attn.o_proj", "o", "attention_output"),
            Linear("mlp.gate_up_proj", "gate_up", "mlp"),
            Linear("mlp.down_proj", "down", "mlp_output"),
        ),
        slice_groups=(
            SliceGroup("neuron", ("mlp.gate_up_proj",), ("mlp.down_proj",), "halves"),
            SliceGroup(
                "kv_group", ("self_attn.qkv_proj",), ("self_attn.o_proj",), "qkv"
            ),
        ),
    ),
    Family(
        "mixtral",
        ("mixtral",),
        _ATTENTION,
        slice_groups=(_HEADS,),
        experts=Experts("block_sparse_moe", "w1", "w3", "w2"),
        gguf_architecture="llama",
    ),
    Family(
        "qwen3_moe",
        ("qwen3_moe",),
        _ATTENTION,
        norms=("input_layernorm", "post_attention_layernorm", *_QK_NORMS),
        slice_groups=(_HEADS,),
        experts=Experts("mlp", "gate_proj", "up_proj", "down_proj"),
        gguf_architecture="qwen3moe",
    ),
)


def family_of(model_type: str) -> Family:
    """Return the family of a transformers ``model_type``.

    Raises:
        CheckpointError: The type is not in the table; the message names what is.
    """
    known = {kind: family for family in FAMILIES for kind in family.model_types}
    if model_type not in known:
        near = difflib.get_close_matches(model_type, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise CheckpointError(
            f"model_type {model_type!r} is not a supported architecture{hint} "
            f"Supported: {', '.join(sorted(known))}"
        )
    return known[model_type]


def interleaves_rotary(architecture: str | None) -> bool:
    """Whether GGUF stores rows of q and k in another order than transformers."""
    return architecture in ("llama", "deci")


def expert_count(config: Mapping[str, Any]) -> int:
    """Return how many experts a mixture has by its transformers config, else 0."""
    return int(config.get("num_local_experts") or config.get("num_experts") or 0)
