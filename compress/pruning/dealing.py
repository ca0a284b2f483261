"""Measuring what budgets need, and dealing widths by it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.core.artifact import ModelDescription, TensorSource
from compress.core.errors import ConfigError
from compress.core.foreign import MALFORMED
from compress.core.neurons import GatedMLP, NeuronStatistics, loudest
from compress.progress import progress_bar
from compress.pruning import budgets, gates
from compress.pruning.budgets import narrowest
from compress.pruning.cutting import choose
from compress.pruning.depth import turns_of
from compress.pruning.exchange import Exchange
from compress.pruning.gradients import Gradients, gradients_of
from compress.pruning.places import MLPPlace, mlp_places
from compress.pruning.repair import repaired
from compress.pruning.statistics import unseen, watched
from compress.workdir import WorkDir, write_atomically

if TYPE_CHECKING:
    from compress.pruning.stage import Pruning

EXCHANGED = ("neurons", "before", "after")
"""What a report says of a round of exchanges."""
LADDER = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.25)
GRADIENT_WINDOWS = 64
_log = logging.getLogger(__name__)
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
        self._have = [block[0].neurons for block in self._places]
        self._share = 1 - pruning.target.removed / sum(self._have)

    def gradients(
        self, work: WorkDir, windows: Tensor | None
    ) -> Mapping[str, Gradients]:
        """Return the effects of all neurons, if method or budgets ask for them."""
        pruning = self._pruning
        if not pruning.target.cuts_neurons or not (
            pruning.pruner.needs_gradients or pruning.budgets in ("effect", "measured")
        ):
            return {}
        assert windows is not None
        path = work.root / _GRADIENTS
        stored = _load(path)
        if stored is None:
            running = pruning.streamed(self._model, self._source)
            found = gradients_of(
                running, windows[:GRADIENT_WINDOWS], self._places, seed=pruning.seed
            )
            _save(path, found)
            stored = _load(path)
            assert stored is not None, "it was just written"
        return stored

    def widths(
        self, windows: Tensor | None, gradients: Mapping[str, Gradients]
    ) -> list[int]:
        """Return the width of each block."""
        pruning = self._pruning
        have = self._have
        if not pruning.target.cuts_neurons:
            return have
        share = self._share
        kind = pruning.budgets
        if kind == "uniform":
            return self.dealt([share] * len(have))
        assert windows is not None
        if kind == "cfsp":
            running = pruning.streamed(self._model, self._source)
            angles = [turn.angle for turn in turns_of(running, windows)]
            return self.dealt(budgets.cfsp_shares(angles, share))
        if kind == "effect":
            scores = [
                torch.stack([gradients[p.path].effect for p in block]).mean(0)
                for block in self._places
            ]
            return self.dealt(budgets.threshold_shares(scores, share))
        if kind == "standardised":
            found = self._measure(windows, gradients, self._standardised)
            return self.dealt(budgets.threshold_shares(found, share))
        if kind == "learned":
            ranks = self._measure(windows, gradients, self._ranks)
            return self.dealt(self._learned(windows, ranks))
        ladders = self._measure(windows, gradients, self._ladder)
        unit = pruning.target.unit
        # Never below what uniform shares take, rounded down, which is on each ladder.
        total = sum(have) - pruning.target.removed
        units = budgets.least_loss([x.tolist() for x in ladders], round(total / unit))
        shares = [n * unit / width for n, width in zip(units, have, strict=True)]
        return self.dealt(shares)

    def exchanged(
        self,
        work: WorkDir,
        windows: Tensor,
        gradients: Mapping[str, Gradients],
        widths: Sequence[int],
    ) -> list[list[int]]:
        """Return the neurons that each block keeps after all rounds of exchanges.

        Rounds that are there are not made again.

        Args:
            work: Where they are kept.
            windows: int64 ``[N, T]`` tokens.
            gradients: Effects, if the method asks for them.
            widths: Neurons that each block keeps before.
        """

        def compute() -> list[list[int]]:
            found = self._starts(windows, gradients, widths)
            return self._exchange(work, windows, *map(list, zip(*found, strict=True)))

        kept: list[list[int]] = work.stage("kept", compute)
        return kept

    def _starts(
        self,
        windows: Tensor,
        gradients: Mapping[str, Gradients],
        widths: Sequence[int],
    ) -> list[tuple[list[int], Tensor, Tensor | None]]:
        """Return each block's choice, protected neurons and second moments."""
        pruning = self._pruning
        found: list[tuple[list[int], Tensor, Tensor | None]] = []

        def look(
            place: MLPPlace, mlp: GatedMLP, statistics: NeuronStatistics, _: float
        ) -> Tensor:
            kept = choose(pruning.pruner, mlp, statistics, widths[place.block])
            repairs = pruning.repair == "least_squares"
            gram = statistics.gram.cpu() if repairs else None
            found.append((kept.tolist(), loudest(statistics).cpu(), gram))
            return torch.zeros(0)

        self._measure(windows, gradients, look)
        return found

    def _exchange(
        self,
        work: WorkDir,
        windows: Tensor,
        kept: list[list[int]],
        protected: list[Tensor],
        grams: list[Tensor | None],
    ) -> list[list[int]]:
        pruning, rounds = self._pruning, self._pruning.section.exchanges
        exchange = Exchange(
            pruning.whole(self._model, self._source),
            windows,
            [block[0] for block in self._places],
            grams,
            protected=protected,
            floors=[max(1, round(budgets.FLOOR * n)) for n in self._have],
            rounds=rounds,
            within=pruning.section.shape == "uniform",
            seed=pruning.seed,
        )
        halvings = 0
        for number in progress_bar(range(rounds), desc="exchanges"):
            once = partial(exchange.round, number, kept, halvings)
            made = work.stage(exchange_stage(number), once)
            kept, halvings = made["kept"], made["halvings"]
        shares = [len(own) / n for own, n in zip(kept, self._have, strict=True)]
        return exchange.fitted(kept, self.dealt(shares))

    def provisional(self) -> list[int]:
        """Return widths of the size to come, before anything is measured."""
        found = self.dealt([self._share] * len(self._have))
        unit, uneven = self._pruning.target.unit, self._pruning.budgets != "uniform"
        if uneven and len(set(found)) == 1 and len(found) > 1 and found[0] > unit:
            return [found[0] - unit, *found[1:]]  # they will differ
        return found

    def dealt(self, shares: Sequence[float]) -> list[int]:
        """Return widths near shares of what blocks have, under the target's total.

        Raises:
            ConfigError: Blocks cannot have one width, or rounding leaves all there is.
        """
        target, have = self._pruning.target, self._have
        total = sum(have) - target.removed
        if not target.removed:
            return have
        if self._pruning.section.shape == "uniform":
            found = self._even(total / len(have))
        else:
            found = budgets.deal(shares, have, total=total, unit=target.unit)
        if found == have and not target.dropped and not target.attentions:
            raise ConfigError(
                f"prune: {target.removed} of {sum(have)} neurons are to go, but widths "
                f"are rounded to multiples of {target.unit}, which leaves all; ask for "
                "more, or set prune.round_to"
            )
        return found

    def _even(self, width: float) -> list[int]:
        """Return one width for all blocks."""
        have, unit = self._have, self._pruning.target.unit
        if len(set(have)) > 1:
            raise ConfigError(
                "prune.shape uniform: the blocks of this model differ in width as they "
                "are; set shape: per-layer"
            )
        rounded = max(narrowest(unit), round(width / unit)) * unit
        return [min(rounded, have[0])] * len(have)

    @torch.no_grad()
    def _measure(
        self,
        windows: Tensor,
        gradients: Mapping[str, Gradients],
        look: Callable[[MLPPlace, GatedMLP, NeuronStatistics, float], Tensor],
    ) -> list[Tensor]:
        """Return what ``look`` sees in each block, mean over its MLPs; one pass."""
        pruning = self._pruning
        running = pruning.streamed(self._model, self._source)
        states = running.embed(windows)
        found = []
        for index in progress_bar(range(len(self._places)), desc="budgets"):
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
            found.append(torch.stack(seen).mean(0))
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

    def _learned(self, windows: Tensor, ranks: Sequence[Tensor]) -> list[float]:
        pruning = self._pruning
        return gates.learned_shares(
            pruning.whole(self._model, self._source),
            windows[:GRADIENT_WINDOWS],
            ranks,
            self._share,
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
        pruning, unit = self._pruning, self._pruning.target.unit
        largest = -(-mlp.neurons // unit)
        least = min(narrowest(unit), largest)
        even = self._share * mlp.neurons / unit
        shares = {round(share * largest) for share in LADDER}
        wanted = {*shares, int(even), math.ceil(even)}
        steps = sorted({max(least, n) for n in wanted})
        down = mlp.down.double()
        power = float(((down @ found.gram.double()) * down).sum())
        losses = []
        for step in steps:
            width = min(step * unit, mlp.neurons)
            kept = choose(pruning.pruner, mlp, found, width)
            error = repaired(mlp, found, kept, pruning.repair).error
            losses.append(0.5 * slope * power * (error or 0.0))
        pairs = list(zip(steps, losses, strict=True))
        return torch.tensor(pairs, dtype=torch.float64)


def exchange_stage(number: int) -> str:
    """Return the stage that holds a round of exchanges."""
    return f"exchange-{number:04d}"


def _save(path: Path, found: Mapping[str, Gradients]) -> None:
    from safetensors.torch import save

    effects = {f"{name}.effect": g.effect.contiguous() for name, g in found.items()}
    slopes = {
        f"{name}.slope": torch.tensor(g.slope, dtype=torch.float64)
        for name, g in found.items()
    }
    write_atomically(path, save(effects | slopes))


def _load(path: Path) -> dict[str, Gradients] | None:
    """Return what :func:`_save` wrote; ``None`` if it is not there or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        return None
    try:
        stored = load_file(path)
        names = [x.removesuffix(".slope") for x in stored if x.endswith(".slope")]
        return {
            name: Gradients(stored[f"{name}.effect"], float(stored[f"{name}.slope"]))
            for name in names
        }
    except (OSError, SafetensorError, RuntimeError, *MALFORMED) as error:
        _log.warning("%s is damaged and made again: %s", path, error)
        return None
