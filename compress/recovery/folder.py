"""A checkpoint folder like another one, in which some tensors have changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from compress.core.artifact import ModelDescription
from compress.core.errors import CheckpointError
from compress.model.sources import read_header
from compress.recovery.trained import Trained
from compress.workdir import WorkDir

_WEIGHTS = ".safetensors"


def check_folder(model: ModelDescription) -> Path:
    """Return the folder of safetensors that a model was opened from.

    Raises:
        CheckpointError: It was opened from something else.
    """
    folder = model.assets
    if folder is None or not list(folder.glob(f"*{_WEIGHTS}")):
        raise CheckpointError(
            f"{model.label}: recovery writes a folder like the model's own, and needs "
            "one of safetensors; give a pruned model's folder, not a GGUF file"
        )
    return folder


def check_weights(source: Path, trained: Trained) -> None:
    """Raise unless each trained weight is a tensor of its own in the folder.

    Raises:
        CheckpointError: Names one that is not.
    """
    stored = {
        name for file in source.glob(f"*{_WEIGHTS}") for name in read_header(file)
    }
    missing = sorted(trained.weights - stored)
    model = trained.model.description
    family = model.family
    embedding, head = f"{family.embedding}.weight", f"{family.head}.weight"
    if model.tied and embedding in trained.weights and head in stored:
        raise CheckpointError(
            f"{source}: {head} is stored beside the embedding that it is tied to; save "
            "the model with save_pretrained of transformers, or set embeddings: false"
        )
    if missing:
        raise CheckpointError(
            f"{source}: {missing[0]} is not stored under that name; save the model "
            "with one tensor for each layer"
        )


def write_recovered(source: Path, target: Path, trained: Trained) -> None:
    """Write what training made of a folder: the same files, shard by shard.

    Whatever is not a trained weight is copied: other tensors, index, config, tokenizer.
    ``target`` is replaced when all of it is there.
    """
    WorkDir(target.parent).replace_folder(
        target, lambda part: _fill(source, part, trained)
    )


def _fill(source: Path, target: Path, trained: Trained) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    for path in sorted(source.iterdir()):
        if path.suffix != _WEIGHTS:
            if path.is_file():
                shutil.copyfile(path, target / path.name)
            continue
        tensors = {}
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            for name in file.keys():  # noqa: SIM118 - not a mapping
                stored = file.get_tensor(name).clone()
                changed = name in trained.weights
                value = trained.dense(name, stored) if changed else stored
                tensors[name] = _checked(name, value, stored)
        save_file(tensors, target / path.name, metadata=metadata)


def _checked(name: str, value: Tensor, stored: Tensor) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise CheckpointError(
            f"{name}: recovery gives values that do not fit {stored.dtype}; set "
            "model.dtype to bfloat16 or float32"
        )
    return value.contiguous()
