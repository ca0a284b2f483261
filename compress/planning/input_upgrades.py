"""Which inputs get finer scales, or stay exact: the rule, without the measuring.

All inputs start as the plan rounds them: with one scale a token, or one for each group
of columns. An input whose KL exceeds ``factor`` times the median of all is an outlier;
outliers with one scale a token get a scale for each group, and those that still are
outliers stay exact. Layers that share an input are upgraded together, because engines
fuse them. Codes of weights do not change.

Source: the idea is FlexQ's (arXiv 2508.04405), whose released code has a fixed list of
layers in place of a rule.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from compress.calibration.input_sensitivity import Sensitivity, SharedInput
from compress.core.artifact import ModelDescription
from compress.core.plan import Plan
from compress.core.scheme import InputScheme

TOKEN, GROUP, EXACT = "token", "group", "a16"
MODES = (TOKEN, GROUP, EXACT)
_GROUP = 128


def shared_inputs(plan: Plan, model: ModelDescription) -> list[SharedInput]:
    """Return the inputs that a plan rounds to integers.

    The first of an input's modes is that of the plan. Behind one scale a token comes
    one for each group, of the weights' columns, else 128; where that does not divide
    the width, an input can only stay exact. Inputs of experts are left out: each sees
    tokens of its own, and rating them by window has no meaning.
    """
    found: list[SharedInput] = []
    for block in range(model.block_count):
        readers: dict[str, list[str]] = {}
        for linear in model.block_linears(block):
            if linear.expert is not None:
                continue
            name = f"{model.family.block(block)}.{linear.path}"
            layer = plan.layers.get(name)
            inputs = layer.scheme.inputs if layer else None
            if inputs is not None and is_upgradable(inputs):
                readers.setdefault(linear.input, []).append(name)
        for shared, names in readers.items():
            found.append(SharedInput(block, shared, tuple(names), _modes(plan, names)))
    return found


def is_upgradable(inputs: InputScheme) -> bool:
    """Whether inputs are integers."""
    return inputs.grid.startswith("int")


def _modes(plan: Plan, names: list[str]) -> dict[str, InputScheme]:
    layer = plan.layers[names[0]]
    planned = layer.scheme.inputs
    assert planned is not None
    if planned.group_size is not None:
        return {GROUP: planned}
    group = layer.scheme.group_size or _GROUP
    modes = {TOKEN: planned}
    if layer.shape[1] % group == 0 and group < layer.shape[1]:
        modes[GROUP] = replace(planned, group_size=group)
    return modes


@dataclass(frozen=True)
class Rating:
    """What is known of one shared input.

    Attributes:
        shared: The input.
        kl: Nats a token, by mode; ``a16`` is zero.
        error: Standard errors of the same.
    """

    shared: SharedInput
    kl: Mapping[str, float]
    error: Mapping[str, float]

    @property
    def planned(self) -> str:
        """The mode that the plan has."""
        return next(iter(self.shared.modes))

    @classmethod
    def of(cls, shared: SharedInput, found: Mapping[str, Sensitivity]) -> Rating:
        """Return the rating that measurements make."""
        return cls(
            shared,
            {**{mode: s.kl for mode, s in found.items()}, EXACT: 0.0},
            {mode: s.error for mode, s in found.items()},
        )


def median_kl(ratings: Sequence[Rating]) -> float:
    """Return the median KL of inputs as the plan rounds them."""
    return statistics.median(rating.kl[rating.planned] for rating in ratings)


def proposals(ratings: Sequence[Rating], factor: float) -> list[dict[int, str]]:
    """Return what to try, in turn: modes by index of the rating, each on top of all.

    First groups for every outlier that they help, then exact inputs for what remains
    an outlier. A proposal that equals the one before is left out.
    """
    limit = factor * median_kl(ratings)
    planned = [r.planned for r in ratings]
    outliers = [i for i, r in enumerate(ratings) if r.kl[planned[i]] > limit]
    grouped = {
        i: GROUP
        for i in outliers
        if ratings[i].kl.get(GROUP, float("inf")) < ratings[i].kl[planned[i]]
    }
    exact = {
        i: EXACT for i in outliers if ratings[i].kl[grouped.get(i, planned[i])] > limit
    }
    steps = [grouped, {**grouped, **exact}]
    return [
        step
        for step, before in zip(steps, [{}, grouped], strict=True)
        if step != before
    ]


def inputs_after(
    ratings: Sequence[Rating], chosen: Mapping[int, str]
) -> dict[str, InputScheme | None]:
    """Return what the inputs of each upgraded layer are rounded to, by layer name."""
    return {
        layer: ratings[i].shared.modes.get(mode)
        for i, mode in chosen.items()
        for layer in ratings[i].shared.layers
    }


def with_inputs(plan: Plan, inputs: Mapping[str, InputScheme | None]) -> Plan:
    """Return the plan with other inputs for some layers; weights stay as they are."""
    layers = {
        name: replace(layer, scheme=replace(layer.scheme, inputs=inputs[name]))
        if name in inputs
        else layer
        for name, layer in plan.layers.items()
    }
    return Plan(plan.model, layers)
