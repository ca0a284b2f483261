"""What lies beside the weights: configs, tokenizer files and the chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.core import compressed_tensors as ct
from compress.core.artifact import CompressedModel, ModelDescription
from compress.core.errors import ExportError
from compress.core.shapes import modeling_files, stored_config
from compress.export import experts
from compress.export.model_card import groups_of

# The release whose layout we write; readers that check it compare major numbers only.
_LAYOUT_VERSION = "0.20.0"
_ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Keys that speak of the original file, or of code that we do not copy.
_DROPPED_KEYS = (
    "quantization_config",
    "torch_dtype",
    "auto_map",
    "_name_or_path",
    "compress",
)
_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def model_config(
    artifact: CompressedModel,
    quantization: Mapping[str, Any] | None,
    *,
    dense: bool = False,
) -> dict[str, Any]:
    """Return ``config.json``: the model's own, with types and codes described.

    Args:
        artifact: What is written.
        quantization: The ``quantization_config``, if there is one.
        dense: Whether decoded values are written instead of codes; the key
            ``compress`` then says of which schemes.
    """
    plan, model = artifact.plan, artifact.description
    config = {k: v for k, v in model.config.items() if k not in _DROPPED_KEYS}
    config["dtype"] = model.dtype
    config["tie_word_embeddings"] = model.tied
    if not config.get("architectures"):
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES,
        )

        config["architectures"] = [NAMES[config["model_type"]]]
    if dense and plan.layers:
        schemes = groups_of(plan.layers)
        config["compress"] = {
            "weights": "decoded",
            "schemes": {scheme.name: len(names) for scheme, names in schemes.items()},
        }
    config = stored_config(config)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    return config


def quantization_config(
    artifact: CompressedModel, *, dense: bool
) -> dict[str, Any] | None:
    """Return what compressed-tensors says about codes and cache, if there are any.

    Each scheme is a group of its own, which names its format.
    """
    plan, model = artifact.plan, artifact.description
    coded = {} if dense else plan.layers
    if not coded and artifact.kv_cache_scheme is None:
        return None
    groups = {
        f"group_{number}": ct.group_entry(scheme, experts.targets(names, model))
        for number, (scheme, names) in enumerate(groups_of(coded).items())
    }
    formats = {group["format"] for group in groups.values()}
    # vLLM wants every linear either targeted or ignored.
    linears = [*model.linears(), *experts.routers(model), model.family.head]
    scheme = artifact.kv_cache_scheme
    return {
        "quant_method": ct.QUANT_METHOD,
        "format": formats.pop()
        if len(formats) == 1
        else (ct.MIXED if formats else ct.NO_CODES),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linears if name not in coded],
        "kv_cache_scheme": None if scheme is None else dict(scheme),
        "global_compression_ratio": None,
        "version": _LAYOUT_VERSION,
    }


def generation_config(model: ModelDescription) -> str | None:
    """Return ``generation_config.json``: the model's own, or its special tokens."""
    own = model.assets / "generation_config.json" if model.assets else None
    if own is not None and own.is_file():
        return own.read_text("utf-8")
    tokens = {key: model.config[key] for key in _TOKEN_KEYS if key in model.config}
    return as_json(tokens) if tokens else None


def write_companions(
    model: ModelDescription, folder: Path, config: Mapping[str, Any], card: str
) -> tuple[Path, ...]:
    """Write all that lies beside the weights; return the files.

    Raises:
        ExportError: A file cannot be written.
    """
    texts = {"config.json": as_json(config), "README.md": card}
    texts |= modeling_files(model.config)
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
    return (*(folder / name for name in texts), *copied)


def as_json(data: Mapping[str, Any]) -> str:
    """Return ``data`` as the text of a JSON file."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def copy_assets(assets: Path | None, folder: Path) -> tuple[Path, ...]:
    """Copy the tokenizer's files; never weights or code."""
    found = [name for name in _ASSETS if assets and (assets / name).is_file()]
    for name in found:
        assert assets is not None
        shutil.copyfile(assets / name, folder / name)
    return tuple(folder / name for name in found)
