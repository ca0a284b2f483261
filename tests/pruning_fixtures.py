"""Random MLPs with measured activations, and models pruned in a temporary folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.config.plugins import create_pruner
from compress.config.prune_section import PruneSection
from compress.core.artifact import ModelDescription, TensorSource
from compress.core.neurons import GatedMLP, NeuronStatistics
from compress.pruning.checks import check_pruning
from compress.pruning.stage import Pruning
from compress.pruning.target import target_of

WINDOWS = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(4))


def random_mlp(
    neurons: int = 24, hidden: int = 12, tokens: int = 400, seed: int = 0
) -> tuple[GatedMLP, Tensor]:
    """Return an MLP, and the inputs of its down matrix ``[T, I]``, not centred."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(tokens, neurons) @ normal(neurons, neurons) / neurons**0.5
    x = (x + 0.3 * normal(neurons)) * (0.2 + normal(neurons).abs())
    mlp = GatedMLP(
        normal(neurons, hidden), normal(neurons, hidden), normal(hidden, neurons)
    )
    return mlp, x


def statistics_of(x: Tensor, effect: Tensor | None = None) -> NeuronStatistics:
    """Return what calibration would measure of inputs ``[T, I]``."""
    wide = x.double()
    return NeuronStatistics(
        gram=(wide.T @ wide / len(x)).float(),
        mean=wide.mean(0).float(),
        peak=x.abs().amax(0),
        tokens=len(x),
        effect=wide.square().mean(0).float() if effect is None else effect,
    )


def pruning_of(
    model: ModelDescription,
    source: TensorSource,
    root: Path,
    *,
    unit: int = 8,
    **section: Any,
) -> Pruning:
    """Return a checked pruning, as a run sets it up."""
    parsed = PruneSection(round_to=unit, **section)
    pruner = create_pruner(parsed.method, parsed.options)
    target = target_of(parsed, pruner, model, unit)
    pruning = Pruning(model, source, parsed, pruner, target, root)
    check_pruning(pruning)
    return pruning


def pruned(
    model: ModelDescription,
    source: TensorSource,
    root: Path,
    *,
    windows: Tensor = WINDOWS,
    **section: Any,
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Prune into ``root``; returns the record, and the kept neurons of each MLP."""
    pruning = pruning_of(model, source, root, **section)
    record = pruning.run(windows if pruning.needs_windows else None, {"test": "1"})
    return record, kept_neurons(root)


def kept_neurons(root: Path) -> dict[str, list[int]]:
    """Return the neurons that stay, by path of the MLP in the pruned model."""
    found: dict[str, list[int]] = {}
    for record in sorted((root / "pruning/results").glob("block-*.json")):
        found |= json.loads(record.read_text())["kept"]
    return found


def loaded(root: Path) -> Any:
    """Return the pruned folder as stock transformers opens it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        root / "pruned", trust_remote_code=True, attn_implementation="eager"
    ).eval()
