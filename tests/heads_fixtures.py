"""Random models whose blocks have four key-value heads, and pruned folders of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from moe_fixtures import KINDS
from pipeline_fixtures import save_checkpoint

from compress import reshaping
from compress.config.schema import Config
from compress.model.loading import open_model

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 8},
    "smollm3": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "phi3": {},
    **KINDS,
}
WINDOWS = torch.randint(3, 400, (6, 32), generator=torch.Generator().manual_seed(1))


def save_heads(
    folder: Path, kind: str = "llama", *, tokenizer: bool = False, **changes: Any
) -> Any:
    """Save a random checkpoint; returns the transformers model."""
    values = HEADS | FAMILIES[kind] | changes
    return save_checkpoint(folder, kind, tokenizer=tokenizer, **values)


def pruning(folder: Path, root: Path, **section: Any) -> Any:
    """Return the pruning of a saved checkpoint, checked."""
    config = Config.model_validate(
        {
            "model": {"path": str(folder)},
            "prune": section,
            "run": {"workdir": str(root)},
        }
    )
    handle = open_model(str(folder), cache=root / "cache")
    return reshaping.pruning_of(config, handle, root=root, device="cpu")


def prune(folder: Path, root: Path, **section: Any) -> dict[str, Any]:
    """Prune a saved checkpoint into ``root/pruned`` and return the record."""
    made = pruning(folder, root, **section)
    windows = WINDOWS if made.needs_windows else None
    record: dict[str, Any] = made.run(windows, {})
    return record


def kept_groups(root: Path, count: int) -> list[list[int]]:
    """Return the groups that each of ``count`` blocks of a pruned folder kept."""
    found = []
    for index in range(count):
        record = root / "pruning/results" / f"block-{index:04d}.json"
        kept = json.loads(record.read_text())["kept"]
        found.append(kept[f"model.layers.{index}.self_attn"])
    return found


def without_groups_(model: Any, kept: list[list[int]]) -> Any:
    """Set the columns of o to zero that read other groups than those kept."""
    for layer, groups in zip(model.model.layers, kept, strict=True):
        weight = layer.self_attn.o_proj.weight
        parts = weight.data.view(len(weight), HEADS["num_key_value_heads"], -1)
        gone = [g for g in range(parts.shape[1]) if g not in groups]
        parts[:, gone] = 0
    return model


def stock(folder: Path, **options: Any) -> Any:
    """Open a folder as users of transformers do."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
