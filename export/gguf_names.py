"""GGUF names of transformers' tensors, and the row order of q and k.

The names come from the table of the ``gguf`` package. Rows: transformers rotates
dimension ``i`` of a head together with ``i + d/2``, ggml's ``llama`` graph ``2i`` with
``2i + 1``, so its converter interleaves the two halves of each head of q and k:
``[heads, 2, d/2, C] -> [heads, d/2, 2, C]``. Whole rows move, so codes and scales move
with them unchanged.

Source: llama.cpp ``convert_hf_to_gguf.py``, ``LlamaModel.permute``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from compress.core.families import Family, interleaves_rotary

_SUFFIXES = (".weight", ".bias")


def name_finder(architecture: str, blocks: int) -> Callable[[str], str | None]:
    """Return a function from transformers' tensor name to the GGUF name.

    Args:
        architecture: GGUF's name of the architecture.
        blocks: Number of decoder blocks.

    Raises:
        KeyError: gguf has no such architecture.
    """
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], blocks)

    def find(name: str) -> str | None:
        found: str | None = table.get_name(name, try_suffixes=_SUFFIXES)
        return found

    return find


def rotary_heads(
    architecture: str, family: Family, config: Mapping[str, Any], module: str
) -> int:
    """Return how many heads' rows GGUF interleaves in ``module``; 0 means none.

    Args:
        architecture: GGUF's name of the architecture.
        family: Row of the family table.
        config: The transformers config as plain data.
        module: Module name such as ``model.layers.0.self_attn.q_proj``.
    """
    if not interleaves_rotary(architecture):
        return 0
    roles = {linear.path: linear.role for linear in family.linears}
    path = module.removeprefix(f"{family.blocks}.").partition(".")[2]
    return heads_of_role(roles.get(path, ""), config)


def heads_of_role(role: str, config: Mapping[str, Any]) -> int:
    """Return the number of heads in the rows of a ``q`` or ``k`` layer, else 0."""
    heads = int(config["num_attention_heads"])
    if role == "q":
        return heads
    if role == "k":
        return int(config.get("num_key_value_heads") or heads)
    return 0


def to_gguf_rows(tensor: Tensor, heads: int) -> Tensor:
    """Return ``tensor`` with the rows of each head interleaved as ggml wants them.

    Args:
        tensor: ``[R, ...]``; codes, scales, weights or a bias.
        heads: Divides ``R``; 0 returns the tensor itself.
    """
    return tensor if heads == 0 else tensor[_order(tensor.shape[0], heads)]


def from_gguf_rows(tensor: Tensor, heads: int) -> Tensor:
    """Return the inverse of :func:`to_gguf_rows`."""
    if heads == 0:
        return tensor
    return tensor[torch.argsort(_order(tensor.shape[0], heads))]


def _order(rows: int, heads: int) -> Tensor:
    index = torch.arange(rows).view(heads, 2, rows // heads // 2)
    return index.transpose(1, 2).reshape(-1)
