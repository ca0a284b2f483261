"""Model families: where blocks, linears, norms, shared inputs and slice groups are.

One row a family. Paths are relative to a decoder block unless they say otherwise, and
are the same in the checkpoint and in transformers' module tree. A family whose experts
are listed is known by name; methods that cannot treat experts refuse it before any
work.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from compress.core.errors import CheckpointError


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block.

    Attributes:
        path: Module path inside the block.
        role: q, k, v, o, qkv, gate, up, gate_up or down.
        input: Name of its input; layers with the same input share statistics.
    """

    path: str
    role: str
    input: str


@dataclass(frozen=True)
class SliceGroup:
    """Rows and columns that must be cut together.

    Attributes:
        unit: What one cut removes: ``neuron`` or ``kv_group``.
        rows: Linears that lose rows.
        columns: Linears that lose columns.
        layout: ``plain``, or ``halves`` when a fused matrix stacks two parts.
    """

    unit: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    layout: str = "plain"


@dataclass(frozen=True)
class Family:
    """Everything the toolkit knows about one kind of decoder.

    Attributes:
        name: Family name for messages.
        model_types: ``model_type`` values of transformers configs.
        linears: Quantizable layers of a block, in order of execution.
        norms: Norms of a block.
        slice_groups: What structured pruning may cut.
        experts: Path of the expert container, if the MLP is a mixture of experts.
        norm_offset: 1 where norms multiply by ``1 + weight``.
        gguf_architecture: Name in GGUF if our own writer knows the family.
        gguf_permutes_rotary: Whether GGUF reorders rows of q and k.
        attention_norm: Norm that feeds the linears with input ``attention``.
        mlp_norm: Norm that feeds the linears with input ``mlp``.
        output_norms: Norms between a sub-layer and the residual stream.
    """

    name: str
    model_types: tuple[str, ...]
    linears: tuple[Linear, ...]
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    slice_groups: tuple[SliceGroup, ...] = ()
    experts: str | None = None
    norm_offset: int = 0
    gguf_architecture: str | None = None
    gguf_permutes_rotary: bool = False
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    output_norms: tuple[str, ...] = ()
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    def block(self, index: int) -> str:
        """Full path of decoder block ``index``."""
        return f"{self.blocks}.{index}"

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
_PLAIN_SLICES = (
    SliceGroup("neuron", ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
    SliceGroup(
        "kv_group",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
    ),
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
        gguf_permutes_rotary=True,
    ),
    Family(
        "mistral",
        ("mistral",),
        _PLAIN,
        slice_groups=_PLAIN_SLICES,
        gguf_architecture="llama",
        gguf_permutes_rotary=True,
    ),
    Family("smollm3", ("smollm3",), _PLAIN, slice_groups=_PLAIN_SLICES),
    Family(
        "qwen2",
        ("qwen2",),
        _PLAIN,
        slice_groups=_PLAIN_SLICES,
        gguf_architecture="qwen2",
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
        ),
    ),
    Family("mixtral", ("mixtral",), _ATTENTION, experts="mlp.experts"),
    Family(
        "qwen3_moe",
        ("qwen3_moe",),
        _ATTENTION,
        norms=("input_layernorm", "post_attention_layernorm", *_QK_NORMS),
        experts="mlp.experts",
    ),
)


def family_of(model_type: str) -> Family:
    """Return the family of a transformers ``model_type``.

    Raises:
        CheckpointError: The type is not in the table, or its experts cannot be treated
            yet; the message names what is supported.
    """
    known = {kind: family for family in FAMILIES for kind in family.model_types}
    dense = sorted(kind for kind, family in known.items() if family.experts is None)
    if model_type not in known:
        near = difflib.get_close_matches(model_type, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise CheckpointError(
            f"model_type {model_type!r} is not a supported architecture{hint} "
            f"Supported: {', '.join(dense)}"
        )
    family = known[model_type]
    if family.experts is not None:
        raise CheckpointError(
            f"model_type {model_type!r} is a mixture of experts: no method here treats "
            f"its expert weights ({family.blocks}.*.{family.experts}) yet; "
            f"use a dense model ({', '.join(dense)})"
        )
    return family
