"""A checkpoint folder that is written block by block, and is whole or says it is not.

Each block is a shard of its own, written atomically as soon as it is done; the index
comes last, and with it the folder becomes a checkpoint. So a run that was killed goes
on behind its last shard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from compress.core.artifact import CompressedModel, ModelDescription, TensorSource
from compress.core.plan import Plan
from compress.core.shapes import modeling_files
from compress.core.tensors import QuantizedTensor
from compress.export.hf_files import (
    as_json,
    copy_assets,
    generation_config,
    model_config,
)
from compress.model.sources import read_header
from compress.workdir import write_atomically

_INDEX = "model.safetensors.index.json"
_REST = "rest"


class ShardFolder:
    """A folder of shards under way.

    Args:
        root: Made when the first shard is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def complete(self) -> bool:
        """Whether the folder is a checkpoint."""
        return (self.root / _INDEX).is_file()

    def has_block(self, index: int) -> bool:
        """Whether the shard of a block is there."""
        return self._path(_shard(index)).is_file()

    def save_block(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of a block, in their storage types."""
        self._save(_shard(index), tensors)

    def finish(
        self, model: ModelDescription, source: TensorSource, extra: Mapping[str, object]
    ) -> None:
        """Write what is in no block, config and tokenizer; last the index.

        Args:
            model: What all shards together are.
            source: Tensors outside of the blocks.
            extra: Entries to add to ``config.json``.
        """
        inside = f"{model.family.blocks}."
        outside = [name for name in model.tensors if not name.startswith(inside)]
        self._save(_REST, {name: source.read(name) for name in outside})
        artifact = CompressedModel(model, Plan(model.label, {}), source, _no_codes)
        config = {**model_config(artifact, None), **extra}
        texts = {"config.json": as_json(config), **modeling_files(model.config)}
        generation = generation_config(model)
        if generation is not None:
            texts["generation_config.json"] = generation
        copy_assets(model.assets, self.root)
        for name, text in texts.items():
            write_atomically(self.root / name, text.encode())
        files = [_shard(i) for i in range(model.block_count)] + [_REST]
        shard_of: dict[str, str] = {}
        for file in files:
            path = self._path(file)
            shard_of |= dict.fromkeys(read_header(path), path.name)
        missing = sorted(set(model.tensors) ^ set(shard_of))
        assert not missing, f"shards and description differ in {missing[:3]}"
        size = sum(self._path(file).stat().st_size for file in files)
        index = {"metadata": {"total_size": size}, "weight_map": shard_of}
        write_atomically(self.root / _INDEX, json.dumps(index, indent=1).encode())

    def _save(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
    ) -> None:
        from safetensors.torch import save

        flat = {key: value.cpu().contiguous() for key, value in tensors.items()}
        # One entry: safetensors writes several in an order that changes.
        data = save(flat, metadata={"format": "pt"})
        write_atomically(self._path(name), data)

    def path(self, index: int) -> Path:
        """Return the file of a block."""
        return self._path(_shard(index))

    def _path(self, shard: str) -> Path:
        return self.root / f"model-{shard}.safetensors"


def _shard(index: int) -> str:
    return f"block-{index:04d}"


def _no_codes(layer: str) -> QuantizedTensor:
    raise KeyError(layer)
