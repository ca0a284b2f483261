"""A whole model in memory, from ids to the states that its head reads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compress.core.artifact import ModelDescription
from compress.distributed.team import Team
from compress.model.loading import ModelHandle
from compress.model.skeleton import build_skeleton
from compress.model.sources import check_finite
from compress.recovery.compiled import compile_blocks_
from compress.recovery.losses import Head
from compress.recovery.masks import without_masks
from compress.recovery.sharding import Shards


class WholeModel:
    """A causal language model, in eval mode, whole on one device or its blocks split.

    Weights are frozen when it is made. The module tree is the one that block-wise runs
    use, so that widths may differ from block to block.

    Args:
        handle: Where config and weights are read.
        device: Where it runs.
        dtype: Of the weights; of the products too, whatever type trained weights have.
        team: Over which the blocks are split; ``None`` keeps them whole.
        trains: Keep the blocks in float32, and let them have gradients, if split.
    """

    def __init__(
        self,
        handle: ModelHandle,
        *,
        device: str,
        dtype: torch.dtype,
        team: Team | None = None,
        trains: bool = False,
    ) -> None:
        self.description: ModelDescription = handle.description
        self.device = torch.device(device)
        self.dtype = dtype
        self.module: nn.Module = build_skeleton(self.description.config)
        family = self.description.family
        self.blocks: Any = self.module.get_submodule(family.blocks)
        self.body: Any = self.module.get_submodule(family.blocks.rpartition(".")[0])
        self.embedding: Any = self.module.get_submodule(family.embedding)
        self.is_split = team is not None
        prefix = f"{family.blocks}."
        names = list(self.module.state_dict())
        self._fill(handle, [n for n in names if not n.startswith(prefix)])
        if team is None:
            self._fill(handle, [n for n in names if n.startswith(prefix)])
        else:
            self._fill_split(handle, Shards(team, self.device, dtype), trains)
        self._move_buffers()
        self.embedding.register_forward_hook(self._rounded)

    def _rounded(self, _module: Any, _inputs: Any, states: Tensor) -> Tensor:
        """Return what an embedding in float32 yields, in the model's type."""
        return states.to(self.dtype)

    def _fill(self, handle: ModelHandle, names: Sequence[str]) -> None:
        """Read weights of the model, frozen; a tied head is the embedding."""
        family = self.description.family
        tied = self.description.tied
        head = f"{family.head}.weight"
        state = {
            name: self._read(handle, name, self.dtype)
            for name in names
            if not (tied and name == head)
        }
        if tied and head in names:
            state[head] = state[f"{family.embedding}.weight"]
        self.module.load_state_dict(state, strict=False, assign=True)
        self.module.requires_grad_(False)

    def _fill_split(self, handle: ModelHandle, shards: Shards, trains: bool) -> None:
        """Read block after block, and keep this process's rows of each."""
        family = self.description.family
        for index, block in enumerate(self.blocks):
            prefix = f"{family.block(index)}."
            kind = torch.float32 if trains else self.dtype
            state = {
                name: self._read(handle, prefix + name, kind)
                for name in block.state_dict()
            }
            block.load_state_dict(state, assign=True)
            block.requires_grad_(trains)
            shards.split_(block)
        shards.join_(self.body)

    def _read(self, handle: ModelHandle, name: str, dtype: torch.dtype) -> Tensor:
        tensor = handle.source.read(name)
        check_finite(tensor, name)
        return tensor.to(self.device, dtype)

    def _move_buffers(self) -> None:
        for module in self.module.modules():  # computed by the model: float32 stays
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)

    def put_(self, name: str, weight: nn.Parameter) -> None:
        """Compute with another weight; that of an embedding is a tied head's too."""
        path, _, leaf = name.rpartition(".")
        family = self.description.family
        paths = [path]
        if path == family.embedding and self.description.tied:
            paths.append(family.head)
        for path in paths:
            self.module.get_submodule(path).register_parameter(leaf, weight)

    @property
    def head(self) -> Head:
        """What turns states into logits."""
        layer: Any = self.module.get_submodule(self.description.family.head)
        softcap = self.description.config.get("final_logit_softcapping")
        return Head(layer.weight.to(self.dtype), layer.bias, softcap)

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Make products run in the model's type where weights are float32."""
        return torch.autocast(
            self.device.type,
            dtype=torch.bfloat16,
            enabled=self.dtype == torch.bfloat16,
        )

    def states(self, ids: Tensor) -> Tensor:
        """Return the head's input ``[B, T, C]`` for ids int64 ``[B, T]``."""
        with self.arithmetic(), without_masks(self.module):
            output = self.body(input_ids=ids, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states

    def states_after(self, prompt: Tensor, ids: Tensor) -> Tensor:
        """Return the states of ids that come after virtual tokens.

        Args:
            prompt: ``[n, C]``, in the place of what the embedding layer yields.
            ids: int64 ``[B, T]``.
        """
        with self.arithmetic(), without_masks(self.module):
            texts = self.embedding(ids)
            first = prompt.to(texts.dtype).expand(len(ids), -1, -1)
            inputs = torch.cat([first, texts], dim=1)
            output = self.body(inputs_embeds=inputs, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states[:, len(prompt) :]

    def compile_blocks(self) -> None:
        """Compile the blocks; see :mod:`compress.recovery.compiled`."""
        compile_blocks_(self.blocks)

    def checkpoint_blocks(self) -> None:
        """Compute each block again in the backward pass, instead of keeping it."""
        for block in self.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
