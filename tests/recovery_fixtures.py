"""A tiny teacher, a student with fewer neurons, text, and options that end soon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from streaming_fixtures import model_of

from compress.config.recover_section import DistillOptions, RecoverOptions
from compress.model.loading import ModelHandle, open_model
from compress.recovery.text import RecoveryText

VOCABULARY = 128


def save_pair(
    folder: Path, *, kind: str = "llama", keep: int = 64
) -> tuple[Path, Path]:
    """Save a random model and a copy with the first ``keep`` neurons of each block."""
    teacher, _, _ = model_of(kind, tied=True, initializer_range=0.15)
    teacher.save_pretrained(folder / "teacher")
    student, _, _ = model_of(kind, tied=True, intermediate_size=keep)
    cut = {
        name: tensor[:keep]
        if "gate_proj" in name or "up_proj" in name
        else tensor[:, :keep]
        if "down_proj" in name
        else tensor
        for name, tensor in teacher.state_dict().items()
    }
    student.load_state_dict(cut)
    student.save_pretrained(folder / "student", max_shard_size="60KB")
    return folder / "teacher", folder / "student"


def opened(folder: Path) -> ModelHandle:
    return open_model(str(folder), cache=folder / "cache")


def text_of(windows: int = 200, held_out: int = 4, length: int = 16) -> RecoveryText:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(
        VOCABULARY, (windows + held_out, length), generator=generator
    )
    return RecoveryText(tokens[held_out:], tokens[:held_out], (), "digest")


def options_of(**changes: Any) -> RecoverOptions:
    values: dict[str, Any] = {
        "steps": 12,
        "batch": 4,
        "evaluations": 4,
        "learning_rate": 5e-4,
        "rank": 8,
        "dtype": "float32",
    }
    return DistillOptions(**(values | changes))
