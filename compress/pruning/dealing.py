"""Measuring what budgets need, and dealing widths by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from compress.core.artifact import ModelDescription, TensorSource
from compress.core.errors import ConfigError
from compress.core.neurons import GatedMLP, NeuronStatistics, loudest
from compress.model.loading import ModelHandle
from compress.pruning import budgets, gates
from compress.pruning.corrected import check_corrected
from compress.pruning.depth import turns_of
from compress.pruning.gradients import Gradients, gradients_of
from compress.pruning.places import MLPPlace, mlp_places
from compress.pruning.repair import repaired
from compress.pruning.statistics import unseen, watched
from compress.recovery.models import WholeModel
from compress.workdir import WorkDir, write_atomically

if TYPE_CHECKING:
    from compress.pruning.stage import Pruning

_LADDER = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.25)
_LEAST = 32
_GRADIENT_WINDOWS = 64
_GRADIENTS = "gradients.safetensors"


class Dealer:
    """Deals widths to the blocks that are left.

    Args:
        pruning: What is to be done.
        model: Without the dropped blocks.
        source: Its tensors.
    """

    def __init__(
        self, pruning: Pruning, model: ModelDescription, source: TensorSource
    ) -> None:
        self._pruning, self._model, self._source = pruning, model, source
        self._places = [mlp_places(model, i) for i in range(model.block_count)]

    def gradients(
        self, work: WorkDir, windows: Tensor | None
    ) -> Mapping[str, Gradients]:
        """Return the effects of all neurons, if method or budgets ask for them."""
        pruning = self._pruning
        if not (
            pruning.pruner.needs_gradients or pruning.budgets in ("effect", "measured")
        ):
            return {}
        assert windows is not None
        path = work.root / _GRADIENTS
        if not path.is_file():
            running = pruning.streamed(self._model, self._source)
            found = gradients_of(
                running, windows[:_GRADIENT_WINDOWS], self._places, seed=pruning.seed
            )
            _save(path, found)
        return _load(path)

    def widths(
        self, windows: Tensor | None, gradients: Mapping[str, Gradients]
    ) -> list[int]:
        """Return the width of each block."""
        pruning = self._pruning
        have = [block[0].neurons for block in self._places]
        share = pruning.target.kept / sum(have)
        kind = pruning.budgets
        if kind == "uniform":
            return self.dealt([share] * len(have), have)
        assert windows is not None
        if kind == "cfsp":
            running = pruning.streamed(self._model, self._source)
            angles = [turn.angle for turn in turns_of(running, windows)]
            return self.dealt(budgets.cfsp_shares(angles, share), have)
        if kind == "effect":
            scores = [
                torch.stack([gradients[p.path].effect for p in block]).mean(0)
                for block in self._places
            ]
            return self.dealt(budgets.threshold_shares(scores, share), have)
        if kind == "standardised":
            found = self._measure(windows, gradients, self._standardised)
            means = [scores.mean(0) for scores in found]
            return self.dealt(budgets.threshold_shares(means, share), have)
        if kind == "learned":
            ranks = self._measure(windows, gradients, self._ranks)
            return self.dealt(self._learned(windows, ranks, share), have)
        losses = self._measure(windows, gradients, self._ladder)
        ladders = [steps.mean(0) for steps in losses]
        total = pruning.target.kept // pruning.target.unit
        units = budgets.least_loss([x.tolist() for x in ladders], total)
        shares = [n * pruning.target.unit / w for n, w in zip(units, have, strict=True)]
        return self.dealt(shares, have)

    def dealt(self, shares: Sequence[float], have: Sequence[int]) -> list[int]:
        """Return widths near shares of what blocks have, under the target's total."""
        target = self._pruning.target
        if self._pruning.budgets == "uniform":
            width = target.kept / len(have)
            unit = target.unit
            rounded = max(unit, round(width / unit) * unit)
            return [own if width >= own else min(rounded, own) for own in have]
        return budgets.deal(shares, have, total=target.kept, unit=target.unit)

    @torch.no_grad()
    def _measure(
        self,
        windows: Tensor,
        gradients: Mapping[str, Gradients],
        look: Callable[[MLPPlace, GatedMLP, NeuronStatistics, float], Tensor],
    ) -> list[Tensor]:
        """Return what ``look`` sees in each block, a row for each MLP; one pass."""
        pruning = self._pruning
        running = pruning.streamed(self._model, self._source)
        states = running.embed(windows)
        found = []
        for index in tqdm(range(len(self._places)), desc="budgets", disable=None):
            places = self._places[index]
            with running.block(index) as block, watched(block, places) as moments:
                running.advance(index, states)
            seen = []
            for place in places:
                mlp = place.read(lambda n: self._source.read(n).to(pruning.device))
                mine = gradients.get(place.path)
                effect = mine.effect if mine else None
                enough = (
                    place.expert is None or moments[place.path].tokens >= mlp.neurons
                )
                statistics = (
                    moments[place.path].result(place.down, effect)
                    if enough
                    else unseen(mlp)
                )
                slope = mine.slope if mine else 1.0
                seen.append(look(place, mlp, statistics, slope).cpu())
            found.append(torch.stack(seen))
        return found

    def _standardised(
        self, _place: MLPPlace, mlp: GatedMLP, statistics: NeuronStatistics, _: float
    ) -> Tensor:
        pruner = self._pruning.pruner
        return budgets.standardised(pruner.scores(mlp, statistics))

    def _ranks(
        self, _place: MLPPlace, mlp: GatedMLP, statistics: NeuronStatistics, _: float
    ) -> Tensor:
        pruner = self._pruning.pruner
        protected = loudest(statistics) if pruner.needs_activations else None
        return gates.ranks_of(pruner.scores(mlp, statistics), protected)

    def _learned(
        self, windows: Tensor, ranks: Sequence[Tensor], share: float
    ) -> list[float]:
        pruning = self._pruning
        model = WholeModel(
            ModelHandle(self._model, self._source),
            device=pruning.device,
            dtype=pruning.dtype,
        )
        return gates.learned_shares(
            model,
            windows[:_GRADIENT_WINDOWS],
            ranks,
            share,
            steps=gates.STEPS,
            seed=pruning.seed,
        )

    def _ladder(
        self, _place: MLPPlace, mlp: GatedMLP, found: NeuronStatistics, slope: float
    ) -> Tensor:
        """Return ``[steps, 2]``: widths in units, and the KL each is predicted to cost.

        The relative error of the output with the method's own choice and repair, times
        the output's mean square, times half its slope.
        """
        from compress.pruning.stage import choose

        pruning, unit = self._pruning, self._pruning.target.unit
        largest = mlp.neurons // unit
        least = -(-_LEAST // unit)
        steps = sorted({max(least, round(share * largest)) for share in _LADDER})
        down = mlp.down.double()
        power = float(((down @ found.gram.double()) * down).sum())
        losses = []
        for step in steps:
            width = mlp.neurons if step == largest else step * unit
            kept = choose(pruning.pruner, mlp, found, width)
            error = repaired(mlp, found, kept, pruning.repair).error
            losses.append(0.5 * slope * power * (error or 0.0))
        pairs = list(zip(steps, losses, strict=True))
        return torch.tensor(pairs, dtype=torch.float64)


def check_budgets(pruning: Pruning) -> None:
    """Raise if the budgets do not go with the method or the shape.

    Raises:
        ConfigError: With what to do.
    """
    section, pruner = pruning.section, pruning.pruner
    if section.shape == "uniform" and section.budgets not in ("auto", "uniform"):
        raise ConfigError(
            f"prune.budgets {section.budgets}: with shape: uniform all blocks have one "
            "width; set shape: per-layer, or leave budgets out"
        )
    target = pruning.target
    least = budgets.FLOOR * target.blocks * sum(target.widths) / len(target.widths)
    if pruning.budgets == "learned" and target.kept <= least:
        raise ConfigError(
            f"prune.budgets learned: {target.kept} neurons would stay, and blocks keep "
            f"at least a quarter of theirs, {least:.0f}; remove less, or take budgets: "
            "uniform"
        )
    if pruning.budgets == "measured" and pruning.repair == "none":
        raise ConfigError(
            "prune.budgets measured: losses are measured after the repair, and there "
            "is none; set repair: least_squares"
        )
    if section.propagate == "corrected":
        if pruning.repair != "least_squares":
            raise ConfigError(
                "prune.propagate corrected: it is a way of least squares; set repair: "
                "least_squares"
            )
        check_corrected(pruning.model)
    if pruning.repair != "none" and not pruner.needs_activations:
        return
    if pruning.repair == "bias" and "mlp_bias" not in pruning.model.config:
        raise ConfigError(
            f"prune.repair bias: {pruning.model.family.name} has no bias in its MLP; "
            "use least_squares"
        )


def _save(path: object, found: Mapping[str, Gradients]) -> None:
    from pathlib import Path

    from safetensors.torch import save

    tensors = {name: g.effect.contiguous() for name, g in found.items()}
    slopes = {name: str(g.slope) for name, g in found.items()}
    write_atomically(Path(str(path)), save(tensors, metadata=slopes))


def _load(path: object) -> dict[str, Gradients]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        slopes = file.metadata()
        return {
            name: Gradients(file.get_tensor(name).clone(), float(slopes[name]))
            for name in file.keys()  # noqa: SIM118 - not a mapping
        }
