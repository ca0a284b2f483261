"""What a pruning cannot do, said before anything is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.core.errors import ConfigError
from compress.pruning import budgets

if TYPE_CHECKING:
    from compress.pruning.stage import Pruning


def check_pruning(pruning: Pruning) -> None:
    """Raise if parts of the section do not go with each other or the model.

    Raises:
        ConfigError: With what to do.
    """
    section = pruning.section
    if section.shape == "uniform" and section.budgets not in ("auto", "uniform"):
        raise ConfigError(
            f"prune.budgets {section.budgets}: with shape: uniform all blocks have one "
            "width; set shape: per-layer, or leave budgets out"
        )
    target = pruning.target
    if section.generated and not pruning.needs_windows:
        raise ConfigError(
            f"prune.generated {section.generated}: nothing here looks at text; leave "
            "it out, or take a method, repair or budgets that do"
        )
    if section.exchanges:
        _check_exchanges(pruning)
    if section.propagate == "corrected":
        _check_correction(pruning)
    left = sum(target.widths) * (1 - target.dropped / len(target.widths))
    if pruning.budgets == "learned" and target.removed >= (1 - budgets.FLOOR) * left:
        raise ConfigError(
            f"prune.budgets learned: {target.removed} of {left:.0f} neurons would go, "
            "and each block keeps a quarter of its own; remove less, or take budgets: "
            "uniform"
        )
    if pruning.budgets == "measured" and pruning.repair == "none":
        raise ConfigError(
            "prune.budgets measured: losses are measured after the repair, and there "
            "is none; set repair: least_squares"
        )
    if pruning.repair == "bias" and "mlp_bias" not in pruning.model.config:
        raise ConfigError(
            f"prune.repair bias: {pruning.model.family.name} has no bias in its MLP; "
            "use least_squares"
        )


def _check_exchanges(pruning: Pruning) -> None:
    if not pruning.target.cuts_neurons:
        raise ConfigError(
            "prune.exchanges: no neurons go, so that none can be exchanged; leave "
            "it out"
        )
    if pruning.repair not in ("least_squares", "none"):
        raise ConfigError(
            f"prune.exchanges with repair {pruning.repair}: a neuron's loss after that "
            "repair is not known; set repair: least_squares or none"
        )
    if pruning.model.experts(0):
        raise ConfigError(
            f"prune.exchanges: {pruning.model.family.name} is a mixture of experts, "
            "which each see a part of the text; leave it out"
        )


def _check_correction(pruning: Pruning) -> None:
    where, family = "prune.propagate corrected", pruning.model.family
    if not pruning.measures_blocks or pruning.repair != "least_squares":
        raise ConfigError(
            f"{where}: only repair least_squares of neurons or heads that go fits "
            "another output; set that, or leave propagate out"
        )
    if pruning.model.experts(0):
        raise ConfigError(
            f"{where}: {family.name} is a mixture of experts, of which none gives the "
            "stream alone; set propagate: pruned"
        )
    if family.output_norms:
        raise ConfigError(
            f"{where}: {family.name} has norms between o or down and "
            "the stream, so that no output of theirs is wanted; set propagate: pruned"
        )
