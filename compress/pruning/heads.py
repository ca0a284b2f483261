"""Key-value groups: one key-value head with the query heads that read it.

A group goes as a whole: its rows of q, k and v, with their biases, and its columns of
o. Norms of queries and keys are shared by all heads and stay; nothing is cut inside a
head, whose rows rotate in pairs. Every block loses as many groups, each its own choice.

With ``G`` the second moment of o's inputs, ``tr(W_P G_PP W_P^T)`` is what goes missing
with the columns ``P``; one group goes after the other, each time the one with which
that is least. Without text the groups with the smallest ``|W_C| |V_C|`` go, ``C`` being
a group's columns of o and ``V_C`` its rows of v.

That what stays takes over some of it is not looked at here, only in the repair. The
loss that the best compensation leaves, the step of SlimGPT (arXiv 2412.18110), gave
smaller errors of o's output but a worse model than the plain loss, repaired likewise,
on the one model where both were tried.

Source: groups of heads that share keys as in LLM-Pruner (arXiv 2305.11627); the loss is
the diagonal one of Wanda-sp (arXiv 2312.11983, section 4.1) with its mixed terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.config.prune_section import PruneSection
from compress.core.artifact import ModelDescription, TensorSource
from compress.core.compensation import complement
from compress.core.errors import CheckpointError, ConfigError
from compress.core.neurons import NeuronStatistics, keep_largest
from compress.core.shapes import heads_obstacle


@dataclass(frozen=True)
class AttentionPlace:
    """The attention of a block, as something to cut.

    Attributes:
        block: Number of the block.
        path: Full path of the attention.
        rows: Full names of the linears that lose rows, each with the parts that it
            stacks: ``q``, ``k``, ``v``.
        down: Full name of the linear that loses columns, which is o.
        down_path: The same inside the block.
        groups: Key-value heads.
        repeats: Query heads that read one of them.
        width: Of a head.
    """

    block: int
    path: str
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    down: str
    down_path: str
    groups: int
    repeats: int
    width: int

    def columns(self, kept: Tensor) -> Tensor:
        """Return which columns of :attr:`down` stay, given the groups that do."""
        return _spread(kept, self.repeats * self.width)

    def row_indices(self, parts: tuple[str, ...], kept: Tensor) -> Tensor:
        """Return which rows of a matrix that stacks ``parts`` stay."""
        found, start = [], 0
        for part in parts:
            size = self.width * (self.repeats if part == "q" else 1)
            found.append(start + _spread(kept, size))
            start += self.groups * size
        return torch.cat(found)

    def values(self, read: Callable[[str], Tensor]) -> Tensor:
        """Return v in float32, ``[groups * width, H]``."""
        name = self.rows[-1][0]  # v is the last, also of a fused matrix
        return read(f"{name}.weight")[-self.groups * self.width :].float()


def _spread(groups: Tensor, size: int) -> Tensor:
    """Return the indices that some groups of ``size`` consist of."""
    inside = torch.arange(size, device=groups.device)
    return (groups[:, None] * size + inside).flatten()


def attention_place(model: ModelDescription, index: int) -> AttentionPlace:
    """Return the attention of a block.

    Raises:
        CheckpointError: The family's attention cannot be cut, or is not of the shape
            that the config says.
    """
    block, config = model.family.block(index), model.config
    cuts = [group for group in model.family.slice_groups if group.unit == "kv_group"]
    if not cuts:
        raise CheckpointError(
            f"{block}: the key-value groups of {model.family.name} cannot be pruned"
        )
    (cut,) = cuts
    heads = int(config["num_attention_heads"])
    groups = kv_heads(model)
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    stacked = [("q", "k", "v")] if cut.layout == "qkv" else [("q",), ("k",), ("v",)]
    (output,) = cut.columns
    down = f"{block}.{output}"
    columns = model.tensors[f"{down}.weight"].shape[1]
    if heads % groups or columns != heads * width:
        raise CheckpointError(
            f"{down} has {columns} columns; the config says {heads} heads of {width}, "
            f"which share {groups}"
        )
    names = [f"{block}.{path}" for path in cut.rows]
    return AttentionPlace(
        index,
        down.rpartition(".")[0],
        tuple(zip(names, stacked, strict=True)),
        down,
        output,
        groups,
        heads // groups,
        width,
    )


def kv_heads(model: ModelDescription) -> int:
    """Return how many key-value heads the blocks of a model have."""
    config = model.config
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def with_kv_groups(model: ModelDescription, count: int) -> ModelDescription:
    """Return the description of a model whose blocks keep ``count`` groups."""
    if count == kv_heads(model):
        return model
    tensors, kept = dict(model.tensors), torch.arange(count)
    for index in filter(model.has_attention, range(model.block_count)):
        place = attention_place(model, index)
        for name, parts in place.rows:
            rows = len(place.row_indices(parts, kept))
            for full in (f"{name}.weight", f"{name}.bias"):
                if full in tensors:
                    shape = (rows, *tensors[full].shape[1:])
                    tensors[full] = replace(tensors[full], shape=shape)
        down = tensors[f"{place.down}.weight"]
        shape = (down.shape[0], len(place.columns(kept)))
        tensors[f"{place.down}.weight"] = replace(down, shape=shape)
    config = {
        **model.config,
        "num_attention_heads": count * place.repeats,
        "num_key_value_heads": count,
        "head_dim": place.width,
    }
    return replace(model, config=config, tensors=tensors)


def check_groups(section: PruneSection, model: ModelDescription) -> None:
    """Raise if a model cannot lose the groups that a config says.

    Raises:
        ConfigError: With the numbers that it can lose.
        CheckpointError: See :func:`attention_place`.
    """
    if not section.kv_groups:
        return
    have, where = kv_heads(model), f"prune.kv_groups {section.kv_groups}"

    def obstacle(gone: int) -> str | None:
        return heads_obstacle(with_kv_groups(model, have - gone).config)

    works = [gone for gone in range(1, have) if obstacle(gone) is None]
    advice = f"{', '.join(map(str, works))} can go" if works else "none can go"
    if section.kv_groups >= have:
        raise ConfigError(
            f"{where}: blocks of {model.label} have {have}, and one has to stay; "
            f"{advice}"
        )
    if section.kv_groups not in works:
        raise ConfigError(f"{where}: {obstacle(section.kv_groups)}: {advice}")
    if section.repair == "bias":
        raise ConfigError(
            f"{where}: repair bias is for neurons; use least_squares, or mask"
        )


def choose_groups(
    place: AttentionPlace, weight: Tensor, found: NeuronStatistics, keep: int
) -> Tensor:
    """Return the groups that stay, int64 ``[keep]``, ascending.

    Args:
        place: The attention.
        weight: float32 ``[H, groups * repeats * width]``, that of o.
        found: Of o's inputs.
        keep: How many stay.
    """
    wide = weight.double()
    each = (wide.T @ wide) * found.gram.double()
    size = place.repeats * place.width
    # Entry g, h is tr(W_g G_gh W_h^T); sums over some rows and columns are losses.
    pairs = each.view(place.groups, size, place.groups, size).sum((1, 3)).cpu()

    def loss(groups: list[int]) -> float:
        return float(pairs[groups][:, groups].sum())

    gone: list[int] = []
    while len(gone) < place.groups - keep:
        left = [group for group in range(place.groups) if group not in gone]
        gone.append(min(left, key=lambda group: loss([*gone, group])))
    return complement(torch.tensor(gone, device=weight.device).long(), place.groups)


def choose_by_weight(
    place: AttentionPlace, weight: Tensor, values: Tensor, keep: int
) -> Tensor:
    """Return the groups that stay by the norms of what they write and read.

    Args:
        place: The attention.
        weight: float32, that of o.
        values: float32 ``[groups * width, H]``, that of v.
        keep: How many stay.
    """
    written = weight.view(len(weight), place.groups, -1).square().sum((0, 2))
    read = values.view(place.groups, -1).square().sum(1)
    return keep_largest((written * read).sqrt(), keep)


def cut_groups(
    place: AttentionPlace, source: TensorSource, kept: Tensor
) -> dict[str, Tensor]:
    """Return q, k and v, with their biases, of the groups that stay, as stored."""
    stored, found = source.tensors(), {}
    for name, parts in place.rows:
        rows = place.row_indices(parts, kept.cpu())
        for full in (f"{name}.weight", f"{name}.bias"):
            if full in stored:
                found[full] = source.read(full)[rows].contiguous()
    return found
