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
from compress.core.sizes import parse_size
from compress.pruning.heads import check_groups, kv_heads, with_kv_groups
from compress.pruning.places import mlp_places

_PROTECTED = 3  # the first two blocks and the last are never dropped
_LEAST = 32  # neurons; a GGUF block of width 0 would lose its attention as well


@dataclass(frozen=True)
class Target:
    """What a pruned model consists of.

    Attributes:
        dropped: Blocks that go.
        widths: Neurons of each MLP of each block of the original.
        kept: Neurons to keep in all remaining blocks; each expert of a mixture has its
            block's width, which counts once.
        unit: What widths are multiples of.
        weights: Weights that a neuron has, averaged over blocks; all experts together.
    """

    dropped: int
    widths: tuple[int, ...]
    kept: int
    unit: int
    weights: float

    @property
    def blocks(self) -> int:
        """Blocks that stay."""
        return len(self.widths) - self.dropped

    @property
    def cuts_neurons(self) -> bool:
        """Whether any goes from a block that stays."""
        return self.kept < round(self.blocks * sum(self.widths) / len(self.widths))


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
    dropped = section.blocks
    if dropped is None:
        share = section.depth_share
        share = pruner.depth_share if share is None else share
        dropped = round(share * remove / (sum(blocks) / count))
    if dropped > max(0, count - _PROTECTED):
        raise ConfigError(
            f"prune: {dropped} of {count} blocks would go; at most "
            f"{max(0, count - _PROTECTED)} can, since the first two and the last stay"
        )
    left = (count - dropped) * sum(widths) / count
    gone = remove - dropped * sum(blocks) / count
    if section.parameters is not None or section.size is not None:
        gone -= (count - dropped) * _group_weights(section, model)
    gone = max(0.0, gone)
    kept = left - gone / neuron
    least = (count - dropped) * max(_LEAST, unit)
    if kept < least:
        raise ConfigError(
            f"prune: {left - kept:.0f} of {left:.0f} neurons would go; at least "
            f"{max(_LEAST, unit)} have to stay in each block; ask for less"
        )
    return Target(dropped, widths, round(kept), unit, neuron)


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
    """Return how many weights a block loses with its heads, mean over blocks."""
    left = with_kv_groups(model, kv_heads(model) - section.kv_groups).tensors
    gone = sum(
        info.elements - left[name].elements for name, info in model.tensors.items()
    )
    return gone / model.block_count


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
