"""Finding out which inputs need finer scales, and how far that helps.

The rule is in ``planning/input_upgrades``, the estimate of single inputs in
``calibration/input_sensitivity``. Every step is confirmed with the KL and the
perplexity of the whole model on the same text, and kept only if the KL falls.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compress.calibration.input_sensitivity import SharedInput, sensitivities
from compress.core.plan import Plan
from compress.core.scheme import InputScheme
from compress.evaluation.divergence import compare_many, mean_and_error
from compress.evaluation.perplexity import TokenWindows
from compress.evaluation.rounding import rounding_of
from compress.model.streaming import StreamedModel
from compress.planning.input_upgrades import (
    EXACT,
    Rating,
    inputs_after,
    median_kl,
    proposals,
    shared_inputs,
    with_inputs,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upgrade:
    """What became of the inputs.

    Attributes:
        inputs: What the inputs of upgraded layers are rounded to, by layer name.
        record: All that was measured, for the report.
    """

    inputs: Mapping[str, InputScheme | None]
    record: Mapping[str, Any]


class Upgrader:
    """Measures a plan's inputs on calibration text.

    Args:
        base: The original model.
        coded: The compressed model with exact inputs.
        plan: Whose inputs are rounded.
        windows: int64 ``[N, T]`` tokens.
        input_amax: Largest inputs in calibration, for two-level schemes.
    """

    def __init__(
        self,
        base: StreamedModel,
        coded: StreamedModel,
        plan: Plan,
        windows: Tensor,
        *,
        input_amax: Mapping[str, float],
    ) -> None:
        self._base, self._coded, self._plan = base, coded, plan
        self._text = TokenWindows("calibration", windows)
        self._amax = input_amax

    def run(
        self, *, factor: float, limit: float, draws: int = 2, seed: int = 0
    ) -> Upgrade:
        """Upgrade outliers until the rise of perplexity is within ``limit``.

        Args:
            factor: An outlier has this many times the median KL.
            limit: Relative rise of perplexity against the base.
            draws: Labels drawn for each position of the estimate.
            seed: Of the draws.
        """
        started = time.perf_counter()
        shared = shared_inputs(self._plan, self._coded.description)
        planned = {next(iter(each.modes)) for each in shared}
        first = " and ".join(sorted(planned, reverse=True))
        steps = self._measure({"weights only": {}, first: self._inputs({})})
        chosen: dict[int, str] = {}
        ratings: list[Rating] = []
        spent = 0.0
        if steps[-1]["rise"] > limit:
            ratings, spent = self._rate(shared, draws, seed)
            for proposal in proposals(ratings, factor):
                inputs = inputs_after(ratings, proposal)
                name = " and ".join(sorted(set(proposal.values()), reverse=True))
                (step,) = self._measure({name: self._inputs(inputs)})
                best = min(s["kl"] for s in steps[1:] if s["kept"])
                step["kept"] = step["kl"] < best
                steps.append(step)
                chosen = proposal if step["kept"] else chosen
                if step["kept"] and step["rise"] <= limit:
                    break
        seconds = time.perf_counter() - started
        record = {
            "factor": factor,
            "limit": limit,
            "tokens": self._text.ids.numel(),
            "steps": steps,
            "median_kl": median_kl(ratings) if ratings else None,
            "inputs": [
                _entry(r, chosen.get(i, r.planned)) for i, r in enumerate(ratings)
            ],
            "seconds": {"sensitivity": spent, "total": seconds},
        }
        layers = inputs_after(ratings, chosen)
        _log.info("inputs of %d layers upgraded in %.0f s", len(layers), seconds)
        return Upgrade(layers, record)

    def _rate(
        self, shared: Sequence[SharedInput], draws: int, seed: int
    ) -> tuple[list[Rating], float]:
        started = time.perf_counter()
        windows = self._text.ids
        found = sensitivities(self._coded, windows, shared, draws=draws, seed=seed)
        ratings = [Rating.of(s, f) for s, f in zip(shared, found, strict=True)]
        return ratings, time.perf_counter() - started

    def _inputs(
        self, upgraded: Mapping[str, InputScheme | None]
    ) -> dict[str, InputScheme | None]:
        plan = with_inputs(self._plan, upgraded)
        return {name: layer.scheme.inputs for name, layer in plan.layers.items()}

    def _measure(
        self, candidates: Mapping[str, Mapping[str, InputScheme | None]]
    ) -> list[dict[str, Any]]:
        """Return KL to the base and rise of perplexity with each choice of inputs."""
        windows = self._text.ids
        streams = {
            name: self._coded.with_source(
                self._coded.source, rounding=rounding_of(inputs, self._amax)
            ).logits(windows, name=name)
            for name, inputs in candidates.items()
        }
        base = self._base.logits(windows, name="base")
        own, others = compare_many(self._text, base, streams)
        steps = []
        for name, scores in others.items():
            assert scores.kl is not None
            rise, error = mean_and_error(scores.nll - own.nll)
            steps.append(
                {
                    "inputs": name,
                    "kl": mean_and_error(scores.kl)[0],
                    "rise": math.expm1(rise),
                    "rise_se": error,
                    "kept": True,
                }
            )
        return steps


def _entry(rating: Rating, mode: str) -> dict[str, Any]:
    kl = {name: value for name, value in rating.kl.items() if name != EXACT}
    return {
        "block": rating.shared.block,
        "input": rating.shared.name,
        "layers": list(rating.shared.layers),
        "kl": kl,
        "kl_se": dict(rating.error),
        "planned": rating.planned,
        "mode": mode,
    }
