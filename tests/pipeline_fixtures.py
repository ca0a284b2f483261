"""Tiny checkpoints on disk with a trained tokenizer, configs, and what runs leave."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf_fixtures import TEXT, save_tokenizer, tiny_config
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner, Result

GGUF = {"format": "gguf", "embedding": "f16"}
BOTH = [{"format": "safetensors"}, GGUF]
LONG_TEXT = "\n\n".join(
    f"{TEXT}\nLine {i} says that {i * 37 % 101} of {i} cats sat on mat {i * i}."
    for i in range(120)
)


def save_checkpoint(
    folder: Path,
    model_type: str = "llama",
    *,
    tokenizer: bool = True,
    dtype: torch.dtype = torch.float32,
    shard: str = "1GB",
    **changes: Any,
) -> Any:
    """Save a random model of two blocks and its tokenizer; returns the model."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type, **changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # no norm is all ones
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard)
    if tokenizer:
        save_tokenizer(folder)
    return model


def write_text(folder: Path, name: str = "text.txt") -> Path:
    """Write a text of some thousand tokens."""
    path = folder / name
    path.write_text(LONG_TEXT, encoding="utf-8")
    return path


def config_of(
    model: Path, text: Path, workdir: Path, /, **changes: Mapping[str, Any] | Any
) -> dict[str, Any]:
    """Return a small config; keywords merge into sections, ``None`` drops one."""
    sections: dict[str, Any] = {
        "model": {"path": str(model)},
        "calibration": {"data": str(text), "samples": 8, "sequence_length": 32},
        "quantize": {"method": "gptq", "scheme": "int4-g32"},
        "evaluate": {"perplexity": [str(text)], "windows": 2, "sequence_length": 32},
        "export": [{"format": "safetensors"}],
        "run": {"workdir": str(workdir), "verify": False, "threads": 1},
    }
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(sections.get(name), Mapping):
            sections[name] = {**sections[name], **value}
        else:
            sections[name] = value
    return {name: value for name, value in sections.items() if value is not None}


def write_config(path: Path, config: Mapping[str, Any]) -> Path:
    """Write a config as YAML."""
    from ruamel.yaml import YAML

    with path.open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(dict(config), file)
    return path


def copy_without(folder: Path, target: Path, *names: str) -> Path:
    """Copy a checkpoint, leaving files out."""
    return Path(shutil.copytree(folder, target, ignore=lambda *_: names))


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def windows(rows: int = 4, length: int = 16, vocabulary: int = 128) -> Tensor:
    """Return random token ids ``[rows, length]``."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, vocabulary, (rows, length), generator=generator)


def call(*arguments: object) -> Result:
    """Run the command line in this process; leaves logging as it was."""
    from compress.cli import app

    logger = logging.getLogger("compress")
    before = logger.handlers[:], logger.propagate, logger.level
    try:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])
    finally:
        logger.handlers[:], logger.propagate, logger.level = before


@dataclass(frozen=True)
class Ground:
    """A checkpoint, a text, and a place for runs."""

    folder: Path
    model: Path
    text: Path

    def config(self, name: str, **changes: Any) -> dict[str, Any]:
        return config_of(self.model, self.text, self.folder / name, **changes)

    def run(self, name: str, **changes: Any) -> Path:
        """Run a config; returns its work directory."""
        import compress

        return compress.run(self.config(name, **changes)).workdir


def report_of(workdir: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((workdir / "report.json").read_text())
    return report


def codes_of(workdir: Path) -> dict[str, torch.Tensor]:
    """Return codes, scales and zeros of all checkpoints of a run."""
    found = {}
    for path in sorted((workdir / "blocks").iterdir()):
        found |= load_file(path)
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def weights_of(folder: Path) -> dict[str, bytes]:
    """Return the weight files of an export by name."""
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(ids).logits
    return logits
