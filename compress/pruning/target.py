"""From "how much" in any unit to blocks and neurons, before anything is measured.

Heads are counted by a unit of all weights (``parameters``, ``size``); by a unit of
neurons they go on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.config.prune_section import PruneSection
from compress.core.artifact import ModelDescription, TensorInfo
from compress.core.contracts import Pruner
from compress.core.errors import ConfigError
from compress.core.shapes import attention_flags, shapes_obstacle, with_attention
from compress.core.sizes import parse_size
from compress.pruning.budgets import narrowest
from compress.pruning.heads import check_groups, kv_heads, with_kv_groups
from compress.pruning.places import mlp_places

_BALANCE = 1.5  # alpha of 2SSP, section 4.3
_PROTECTED = 3  # the first two blocks and the last are never dropped


@dataclass(frozen=True)
class Target:
    """What a pruned model consists of.

    Attributes:
        dropped: Blocks that go.
        attentions: Blocks of those that stay which lose their attention.
        widths: Neurons of each MLP of each block of the original.
        removed: Neurons that go in the blocks that stay; each expert of a mixture has
            its block's width, which counts once.
        unit: What widths are multiples of.
    """

    dropped: int
    attentions: int
    widths: tuple[int, ...]
    removed: int
    unit: int

    @property
    def cuts_neurons(self) -> bool:
        """Whether any goes from a block that stays."""
        return self.removed > 0


def target_of(
    section: PruneSection, pruner: Pruner, model: ModelDescription, unit: int
) -> Target:
    """Return what a config asks for.

    Args:
        section: Of the config.
        pruner: Knows its usual share of depth.
        model: Dense.
        unit: Multiple of all widths.

    Raises:
        ConfigError: That much cannot be removed.
    """
    check_groups(section, model)
    count = model.block_count
    places = [mlp_places(model, i) for i in range(count)]
    widths = tuple(block[0].neurons for block in places)
    mlp = [sum(_weights(model, p.down, p.rows) for p in block) for block in places]
    neuron = sum(mlp) / sum(widths)
    whole = sum(info.elements for info in model.tensors.values())
    blocks = [_block_weights(model, i) for i in range(count)]
    remove = _removed_weights(section, model, neuron, widths, whole)
    block = sum(blocks) / count
    dropped, attentions = section.blocks, 0
    if section.depth_unit == "attention":
        dropped, attentions = 0, _attentions(section, model, remove, sum(mlp))
        remove -= attentions * _attention_weights(model)
    elif dropped is None:
        dropped = round(_depth_share(section, pruner) * remove / block)
    elif section.total is not None and dropped * block > remove + block / 2:
        raise ConfigError(
            f"prune: {dropped} blocks are {dropped * block / whole:.1%} of all weights "
            f"but {section.total} comes to {remove / whole:.1%}; leave one of them out"
        )
    most = max(0, count - _PROTECTED)
    if dropped > most:
        raise ConfigError(
            f"prune: {dropped} of {count} blocks would go; at most {most} can, since "
            "the first two and the last stay; ask for less, or set depth_share"
        )
    left = (count - dropped) * sum(widths) / count
    if section.expansion_ratio is not None:
        remove *= (count - dropped) / count
    else:
        remove -= dropped * block
    if section.parameters is not None or section.size is not None:
        attending = attention_flags(model.config).count(True) - attentions
        share = (count - dropped) / count
        remove -= share * attending * _group_weights(section, model)
    removed = max(0.0, remove) / neuron
    least = narrowest(unit) * unit
    if removed and left - removed < (count - dropped) * least:
        raise ConfigError(
            f"prune: {removed:.0f} of {left:.0f} neurons would go, and {least} have to "
            f"stay in each block (a multiple of round_to: {unit}); ask for less, or "
            "for whole blocks too (depth_share)"
        )
    return Target(dropped, attentions, widths, round(removed), unit)


def _depth_share(section: PruneSection, pruner: Pruner) -> float:
    """Return the share of the removed weights that goes as blocks."""
    if section.expansion_ratio is not None:
        return 0.0  # it names the width; blocks would have to be named as well
    share = section.depth_share
    return pruner.depth_share if share is None else share


def _attentions(
    section: PruneSection, model: ModelDescription, remove: float, mlp: int
) -> int:
    """Return how many blocks lose their attention.

    Without a share, as many as 2SSP (arXiv 2501.17771, equation 5) removes: of L, with
    p the share of the blocks' weights that goes, ``round(L p^(MLP/attention/1.5))``.

    Raises:
        ConfigError: There are not as many, or no folder can be told so.
    """
    flags = attention_flags(model.config)
    most = flags.count(True) - 1
    tried = with_attention(model.config, [True] + [False] * (len(flags) - 1))
    obstacle = shapes_obstacle(tried) if len(flags) > 1 else None
    if obstacle is not None:
        raise ConfigError(f"prune.depth_unit attention: {obstacle}")
    one = _attention_weights(model)
    if section.depth_share is not None:
        found = round(section.depth_share * remove / one)
    else:
        blocks = sum(_block_weights(model, i) for i in range(len(flags)))
        power = mlp / (flags.count(True) * one) / _BALANCE
        found = round(flags.count(True) * (remove / blocks) ** power)
        found = min(found, int(remove / one))
    if found > most:
        raise ConfigError(
            f"prune: {found} of {flags.count(True)} attentions would go; at most "
            f"{most} can, since that of the first block stays; lower depth_share"
        )
    return found


def _attention_weights(model: ModelDescription) -> float:
    """Return how many weights attention has with its norms, mean over blocks."""
    flags, family = attention_flags(model.config), model.family
    found = 0
    for index in range(len(flags)):
        block = f"{family.block(index)}."
        found += sum(
            info.elements
            for name, info in model.tensors.items()
            if name.startswith(block)
            and family.is_attention(name.removeprefix(block).rpartition(".")[0])
        )
    return found / flags.count(True)


def _removed_weights(
    section: PruneSection,
    model: ModelDescription,
    neuron: float,
    widths: tuple[int, ...],
    whole: int,
) -> float:
    """Return how many weights are to go."""
    if section.sparsity is not None:
        return section.sparsity * sum(widths) * neuron
    if section.parameters is not None:
        return section.parameters * whole
    if section.expansion_ratio is not None:
        width = section.expansion_ratio * int(model.config["hidden_size"])
        if width > max(widths):
            raise ConfigError(
                f"prune.expansion_ratio {section.expansion_ratio}: that is a width of "
                f"{width:.0f}, above the model's {max(widths)}"
            )
        return neuron * sum(max(0.0, own - width) for own in widths)
    if section.size is not None:
        bytes_ = sum(_bytes(info) for info in model.tensors.values())
        wanted = parse_size(str(section.size))
        if wanted >= bytes_:
            raise ConfigError(
                f"prune.size {section.size}: the model has {bytes_} bytes already"
            )
        return (bytes_ - wanted) * whole / bytes_
    return 0.0


def _group_weights(section: PruneSection, model: ModelDescription) -> float:
    """Return how many weights an attention loses with its heads, on average."""
    left = with_kv_groups(model, kv_heads(model) - section.kv_groups).tensors
    gone = sum(
        info.elements - left[name].elements for name, info in model.tensors.items()
    )
    return gone / attention_flags(model.config).count(True)


def _bytes(info: TensorInfo) -> int:
    return info.elements * (4 if info.dtype == "float32" else 2)


def _weights(model: ModelDescription, down: str, rows: tuple[str, ...]) -> int:
    names = [f"{down}.weight", *(f"{name}.{k}" for name in rows for k in _KINDS)]
    return sum(model.tensors[name].elements for name in names if name in model.tensors)


_KINDS = ("weight", "bias")


def _block_weights(model: ModelDescription, index: int) -> int:
    prefix = f"{model.family.block(index)}."
    return sum(
        info.elements for name, info in model.tensors.items() if name.startswith(prefix)
    )
