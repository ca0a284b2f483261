"""Finds in a model what ``fusion.py`` can put together, by the table of families."""

from __future__ import annotations

from typing import Any

from torch import nn

from compress.core.families import Family
from compress.model.experts import SplitExperts
from compress.runtime.w6a8.fusion import (
    GatedDown,
    GatedMLP,
    NormedLinear,
    StackedLinear,
    agree,
    epsilon,
)

_ACTIVATIONS = ("act_fn", "activation_fn")


def fuse_(model: nn.Module, family: Family) -> int:
    """Put norms and the W6A8 layers that read them together, in all blocks.

    What does not fit is left as it is: layers of different schemes, inputs that are not
    rounded, other norms.

    Args:
        model: Of transformers; changed in place.
        family: Of the model.

    Returns:
        How many calls of linear layers there are less in a pass of a dense model.
    """
    saved = 0
    for block in model.get_submodule(family.blocks).children():
        saved += _fuse_attention_(block, family)
        saved += _fuse_mlp_(block, family)
    for module in model.modules():
        if isinstance(module, SplitExperts) and family.experts is not None:
            names = family.experts.gate, family.experts.up, family.experts.down
            for number, expert in enumerate(module):
                module[number] = _fused_expert(expert, names)
    return saved


def _fuse_attention_(block: nn.Module, family: Family) -> int:
    paths = [p for p in family.readers("attention") if _has(block, p)]
    return _fuse_norm_(block, family, family.attention_norm, paths)


def _fuse_mlp_(block: nn.Module, family: Family) -> int:
    linears = family.block_linears(0)
    paths = [x.path for x in linears if x.input == "mlp" and _has(block, x.path)]
    down = next(x.path for x in linears if x.role == "down")
    if not paths or not _has(block, down):
        return 0
    place, name = down.rsplit(".", 1)
    mlp = block.get_submodule(place)
    activation = next((getattr(mlp, a) for a in _ACTIVATIONS if hasattr(mlp, a)), None)
    if activation is None or not type(mlp).__name__.endswith("MLP"):
        return 0
    last = mlp.get_submodule(name)
    saved = _fuse_norm_(block, family, family.mlp_norm, paths)
    if isinstance(block.get_submodule(family.mlp_norm), NormedLinear):
        parts: Any = {p.rsplit(".", 1)[1]: block.get_submodule(p) for p in paths}
        block.set_submodule(place, GatedDown(parts, (name, last), activation))
    return saved


def _fuse_norm_(block: nn.Module, family: Family, norm: str, paths: list[str]) -> int:
    """Give the norm's place to norm and layers; return the calls that this saves."""
    if not paths or not _has(block, norm):
        return 0
    layers: list[Any] = [block.get_submodule(path) for path in paths]
    module = block.get_submodule(norm)
    if not agree(layers) or epsilon(module) is None:
        return 0
    stacked = StackedLinear(layers)
    plus_one = bool(family.norm_offset)
    block.set_submodule(norm, NormedLinear(module, stacked, plus_one=plus_one))
    for path, part in zip(paths, stacked.parts(), strict=True):
        block.set_submodule(path, part)
    return len(paths) - 1


def _fused_expert(expert: Any, names: tuple[str, str, str]) -> nn.Module:
    """Return an expert whose gate and up are one call, or the same one."""
    gate, up, down = names
    layers: list[Any] = [expert.get_submodule(name) for name in (gate, up)]
    if not agree(layers):
        return expert  # type: ignore[no-any-return]
    stacked = StackedLinear(layers)
    parts = dict(zip((gate, up), stacked.parts(), strict=True))
    last = (down, expert.get_submodule(down))
    return GatedMLP(stacked, parts, last, expert.activation)


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
