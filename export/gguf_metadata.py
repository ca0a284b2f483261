"""GGUF metadata of the architectures that our own writer knows.

``llama`` (also mistral, mixtral), ``qwen2``, ``qwen3`` and ``qwen3moe``; ``deci`` for
a llama, mistral or qwen2 whose blocks differ in width or lack attention (0 heads),
and for a qwen2 that has lost heads. It is llama's graph, and the only one here whose
sizes may be an array with an entry for each block. What GGUF or llama.cpp's graph
cannot express is an error here, not a file that computes something else.

Source: llama.cpp ``convert_hf_to_gguf.py`` and ``gguf.constants.Keys``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from compress.core.artifact import ModelDescription
from compress.core.contracts import Problem
from compress.core.shapes import attention_flags, mlp_widths
from compress.export.gguf_experts import expert_metadata
from compress.export.gguf_reader import GGUFFile, MetadataValue
from compress.export.gguf_writer import real, text, whole, wholes

ROPE_TENSOR = "rope_freqs.weight"
FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k": 12,
    "q4_k": 15,
    "q5_k": 17,
    "q6_k": 18,
    "iq4_nl": 25,
    "iq4_xs": 30,
    "bf16": 32,
    "mxfp4": 38,
    "nvfp4": 39,
}
_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
_REPLACED = {
    "general.architecture",
    "general.alignment",
    "general.file_type",
    "general.quantization_version",
    "general.quantized_by",
    "general.name",
}


def package_version() -> str:
    """Return the installed version of this package."""
    try:
        return version("compress-llm")
    except PackageNotFoundError:
        return "from source"


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope settings of old and new transformers configs in the new form."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return rope


def head_width(config: Mapping[str, Any]) -> int:
    """Return the width of an attention head."""
    stated = config.get("head_dim")
    return int(stated or config["hidden_size"] // config["num_attention_heads"])


def config_problems(config: Mapping[str, Any]) -> list[Problem]:
    """List settings of a config that our own writer cannot express in GGUF."""
    problems = []
    rope = rope_parameters(config)
    remedy = "give `template: FILE.gguf` made by llama.cpp's own converter"
    if rope["rope_type"] not in _ROPE_TYPES:
        known = ", ".join(_ROPE_TYPES)
        problems.append(
            Problem(
                "rope_parameters",
                f"rope type {rope['rope_type']!r} is not one of {known}; {remedy}",
            )
        )
    for key, plain in (("attention_factor", None), ("mscale", None)):
        if rope.get(key, plain) != plain:
            problems.append(
                Problem("rope_parameters", f"{key} {rope[key]} is set; {remedy}")
            )
    if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        problems.append(Problem("rope_parameters", f"rotary is partial; {remedy}"))
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        problems.append(Problem("hidden_act", f"{activation!r} is not silu; {remedy}"))
    return problems


def config_notes(config: Mapping[str, Any]) -> list[str]:
    """List what llama.cpp does differently with files of our own writer."""
    window = config.get("sliding_window")
    if config["model_type"] not in (
        "mistral",
        "mixtral",
    ):  # Qwen's windows are off unless switched on
        window = window if config.get("use_sliding_window") else None
    if window is None or window >= config["max_position_embeddings"]:
        return []
    return [
        f"llama.cpp does not limit attention to the model's window of {window} tokens: "
        "longer texts give other results than transformers"
    ]


def architecture_metadata(model: ModelDescription) -> dict[str, MetadataValue]:
    """Return ``general.*`` and ``<architecture>.*`` for a known family.

    Args:
        model: Its family names a GGUF architecture and :func:`config_problems` is
            empty.
    """
    name = model.gguf_architecture
    assert name is not None, "check() refuses families without an architecture"
    config = model.config
    heads = int(config["num_attention_heads"])
    shared = int(config.get("num_key_value_heads") or heads)
    width = head_width(config)
    rope = rope_parameters(config)
    values = {
        "block_count": whole(model.block_count),
        "context_length": whole(config["max_position_embeddings"]),
        "embedding_length": whole(config["hidden_size"]),
        "feed_forward_length": whole(config["intermediate_size"]),
        "attention.head_count": whole(heads),
        "attention.head_count_kv": whole(shared),
        "attention.key_length": whole(width),
        "attention.value_length": whole(width),
        "attention.layer_norm_rms_epsilon": real(config["rms_norm_eps"]),
        "rope.dimension_count": whole(width),
        "rope.freq_base": real(rope["rope_theta"]),
        "vocab_size": whole(model.tensors[f"{model.family.embedding}.weight"].shape[0]),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        values["rope.scaling.type"] = text(rope["rope_type"])
        values["rope.scaling.factor"] = real(rope["factor"])
    if rope["rope_type"] == "yarn":
        original = rope.get(
            "original_max_position_embeddings", config["max_position_embeddings"]
        )
        values["rope.scaling.original_context_length"] = whole(original)
        for ours, theirs in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            values[f"rope.scaling.yarn_{ours}"] = real(rope.get(ours) or theirs)
    if name == "deci":
        flags = attention_flags(config)
        values["feed_forward_length"] = wholes(mlp_widths(config))
        values["attention.head_count"] = wholes([heads * flag for flag in flags])
        values["attention.head_count_kv"] = wholes([shared * flag for flag in flags])
    values |= expert_metadata(model)
    general = {"general.architecture": text(name), "general.type": text("model")}
    return general | {f"{name}.{key}": value for key, value in values.items()}


def rope_divisors(config: Mapping[str, Any]) -> Tensor | None:
    """Return the per-frequency divisors of Llama 3.1's rope, or ``None``.

    Long wavelengths are divided by ``factor``, short ones by 1, those between by a
    blend. Returns float32 ``[head_dim / 2]``, stored as ``rope_freqs.weight``.

    Source: transformers ``modeling_rope_utils._compute_llama3_parameters``.
    """
    rope = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    width = head_width(config)
    powers = torch.arange(0, width, 2, dtype=torch.float32) / width
    frequencies = 1.0 / (float(rope["rope_theta"]) ** powers)
    factor = float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    context = float(rope["original_max_position_embeddings"])
    wavelengths = 2 * math.pi / frequencies
    smooth = ((context / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def copied_metadata(source: GGUFFile) -> dict[str, MetadataValue]:
    """Return the tokenizer and the descriptive keys of a GGUF file, to write again."""
    return {
        key: value
        for key, value in source.metadata.items()
        if key.startswith("tokenizer.")
        or (key.startswith("general.") and key not in _REPLACED)
    }


def stamp(*, name: str, main_type: str) -> dict[str, MetadataValue]:
    """Return the keys that say what this file is and who wrote it.

    Args:
        name: Name for people.
        main_type: Type that holds most of the weights.
    """
    values = {
        "general.name": text(name),
        "general.quantization_version": whole(2),
        "general.quantized_by": text(f"compress-llm {package_version()}"),
    }
    if main_type in FILE_TYPES:
        values["general.file_type"] = whole(FILE_TYPES[main_type])
    return values
