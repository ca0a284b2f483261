"""Transformers configs from GGUF metadata.

``llama``, ``deci``, ``qwen2``, ``qwen3`` and ``qwen3moe`` are read here: transformers'
own reader (5.23) leaves out rope scaling, biases, the width of Qwen3's heads and of its
experts, and takes its classes' defaults instead. Other architectures go through that
reader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compress.core.errors import CheckpointError
from compress.core.shapes import with_attention, with_widths
from compress.export.gguf_metadata import ROPE_TENSOR, rope_divisors
from compress.export.gguf_reader import GGUFFile, open_gguf

KNOWN_ARCHITECTURES = frozenset({"llama", "deci", "qwen2", "qwen3", "qwen3moe"})
_CLASSES = {  # by model_type
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# Llama 3.1 and 3.2: the only settings in use besides the factor, which varies.
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def gguf_dtype(file: GGUFFile) -> str:
    """Return the type to treat the model in.

    bfloat16 if any matrix is BF16 (float16 could overflow), float32 if all are F32,
    else float16.
    """
    kinds = {t.type for t in file.tensors.values() if len(t.shape) > 1}
    if "bf16" in kinds:
        return "bfloat16"
    return "float32" if kinds == {"f32"} else "float16"


def read_gguf_config(path: Path) -> dict[str, Any]:
    """Return the transformers config of a GGUF file as plain data.

    Raises:
        CheckpointError: The file is damaged, its architecture is unknown, or its
            metadata says what the architecture's config cannot.
    """
    from transformers import AutoConfig

    file = open_gguf(path)
    if file.architecture in KNOWN_ARCHITECTURES:
        values = _known_config(file)
        try:
            config = AutoConfig.for_model(_model_type(file), **values)
        except Exception as error:  # each release checks with errors of its own
            raise CheckpointError(
                f"{path}: transformers refuses the config that its metadata describe "
                f"({error}); the file is damaged: fetch it again"
            ) from error
    else:
        try:
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise CheckpointError(
                f"{path}: transformers cannot read architecture "
                f"{file.architecture!r} from GGUF ({error}); use the original model "
                "folder"
            ) from error
    data: dict[str, Any] = config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        data.pop(key, None)
    return data | {"dtype": gguf_dtype(file)}


def _model_type(file: GGUFFile) -> str:
    if file.architecture == "llama" and file.architecture_value("expert_count", 0):
        return "mixtral"
    if file.architecture == "deci":  # llama's graph; which model only its biases tell
        q, o = (f"blk.0.attn_{part}.bias" in file.tensors for part in ("q", "output"))
        return "qwen2" if q and not o else "llama"
    return {"qwen3moe": "qwen3_moe"}.get(file.architecture, file.architecture)


def _known_config(file: GGUFFile) -> dict[str, Any]:
    heads = _heads(file, "attention.head_count")
    hidden = _whole(file, "embedding_length")
    width = file.architecture_value("attention.key_length", hidden // heads)
    if width != file.architecture_value("attention.value_length", width):
        raise CheckpointError(f"{file.path}: keys and values differ in width")
    kind = _model_type(file)
    if file.architecture_value("rope.dimension_count", width) != width:
        raise CheckpointError(f"{file.path}: rotary covers only a part of each head")
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing")
    config = {
        "architectures": [_CLASSES[kind]],
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        **_blocks(file),
        "num_attention_heads": heads,
        "num_key_value_heads": _heads(file, "attention.head_count_kv", heads),
        "head_dim": width,
        "max_position_embeddings": _whole(file, "context_length"),
        "rms_norm_eps": file.require(
            f"{file.architecture}.attention.layer_norm_rms_epsilon"
        ),
        "rope_parameters": _rope(file, width),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    config |= _experts(file, kind)
    if kind not in ("qwen2", "mixtral"):  # q, k and v always have one, or never
        config["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
    if kind == "llama":
        config["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{ours}_token_id"] = file.get(f"tokenizer.ggml.{theirs}_token_id")
    return config


def _experts(file: GGUFFile, kind: str) -> dict[str, Any]:
    """Return the keys of a mixture of experts; none for other models."""
    if kind not in ("mixtral", "qwen3_moe"):
        if file.architecture_value("expert_count", 0):
            raise CheckpointError(
                f"{file.path}: {file.architecture} with experts is not supported"
            )
        return {}
    count = "num_local_experts" if kind == "mixtral" else "num_experts"
    config: dict[str, Any] = {
        count: _whole(file, "expert_count"),
        "num_experts_per_tok": _whole(file, "expert_used_count"),
    }
    if kind == "qwen3_moe":  # llama.cpp's graph of it always normalises
        config["moe_intermediate_size"] = _whole(file, "expert_feed_forward_length")
        config["norm_topk_prob"] = True
    return config


def _blocks(file: GGUFFile) -> dict[str, Any]:
    """Return how many blocks there are, how wide their MLPs, and which attend."""
    blocks: dict[str, Any] = {"num_hidden_layers": _whole(file, "block_count")}
    widths = file.architecture_value("feed_forward_length")
    heads = file.architecture_value("attention.head_count")
    uneven = file.architecture == "deci"
    if not uneven or not isinstance(widths, list):
        blocks["intermediate_size"] = _whole(file, "feed_forward_length")
    try:
        if uneven and isinstance(widths, list):
            blocks = with_widths(blocks, widths)
        if uneven and isinstance(heads, list):
            blocks = with_attention(blocks, [count > 0 for count in heads])
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: sizes of blocks: {error}") from error
    return blocks


def _heads(file: GGUFFile, suffix: str, default: int | None = None) -> int:
    """Return the heads of blocks that have attention; all have as many."""
    value = file.architecture_value(suffix, default)
    if file.architecture == "deci" and isinstance(value, list):
        counts = file.architecture_value("attention.head_count")
        without = [n == 0 for n in counts] if isinstance(counts, list) else []
        found = {n for n in value if n}
        if without == [n == 0 for n in value] and len(found) == 1:
            return int(found.pop())
    return _whole(file, suffix, default)


def _whole(file: GGUFFile, suffix: str, default: int | None = None) -> int:
    value = file.architecture_value(suffix, default)
    if isinstance(value, list) and value and value.count(value[0]) == len(value):
        value = value[0]
    if not isinstance(value, int):
        raise CheckpointError(
            f"{file.path}: {file.architecture}.{suffix} is {value!r}; one whole number "
            "for all blocks is needed"
        )
    return value


def _rope(file: GGUFFile, width: int) -> dict[str, Any]:
    theta = file.architecture_value("rope.freq_base", 10000.0)
    rope: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    if ROPE_TENSOR in file.tensors:
        return rope | _llama3_rope(file, theta, width)
    kind = file.architecture_value("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope["rope_type"] = kind
        rope["factor"] = file.require(f"{file.architecture}.rope.scaling.factor")
        original = file.architecture_value("rope.scaling.original_context_length")
        if kind == "yarn" and original:
            rope["original_max_position_embeddings"] = original
    elif kind != "none":
        raise CheckpointError(
            f"{file.path}: rope scaling {kind!r} is not none, linear or yarn"
        )
    return rope


def _llama3_rope(file: GGUFFile, theta: float, width: int) -> dict[str, Any]:
    """Return the settings that give the divisors in the file, after trying them."""
    stored = torch.from_numpy(file.read_values(ROPE_TENSOR)).flatten()
    scaling = {**_LLAMA3, "rope_theta": theta, "factor": round(float(stored.max()), 3)}
    sample = {
        "rope_parameters": scaling,
        "head_dim": width,
        "hidden_size": width,
        "num_attention_heads": 1,
    }
    expected = rope_divisors(sample)
    if expected is None or not torch.allclose(stored, expected, rtol=1e-4):
        raise CheckpointError(
            f"{file.path}: {ROPE_TENSOR} is not Llama 3.1's scaling; use the original "
            "model folder"
        )
    return scaling
