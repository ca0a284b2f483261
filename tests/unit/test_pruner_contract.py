"""One contract for every registered pruner, and for one from outside."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from pruning_fixtures import random_mlp, statistics_of

from compress import registry
from compress.core.contracts import Pruner
from compress.core.neurons import GatedMLP, NeuronStatistics
from compress.pruning.budgets import BUDGETS

OUTSIDE = Path(__file__).parents[1] / "plugin/compress-plugin-demo"
NEURONS = 40


def pruner_class(name: str) -> type[Pruner]:
    if name != "outside":
        return registry.get_pruner(name)
    file = OUTSIDE / "demo_longest.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plugin: type[Pruner] = module.Longest
    return plugin


@pytest.fixture(params=[*registry.names("pruners"), "outside"])
def pruner(request: pytest.FixtureRequest) -> Pruner:
    return pruner_class(request.param)()


def case() -> tuple[GatedMLP, NeuronStatistics]:
    """Return an MLP with a dead, a silent and a massive neuron."""
    mlp, x = random_mlp(neurons=NEURONS)
    mlp.down[:, 3] = 0
    x[:, 4] = 0
    x[5, 5] = 1e4
    return mlp, statistics_of(x)


def given_to(pruner: Pruner, found: NeuronStatistics) -> NeuronStatistics | None:
    """Return what a run would hand to a pruner."""
    if not pruner.needs_activations:
        return None
    return found if pruner.needs_gradients else replace(found, effect=None)


def test_it_says_what_it_is(pruner: Pruner) -> None:
    for text in (pruner.name, pruner.summary, pruner.source, type(pruner).__doc__):
        assert isinstance(text, str) and text.strip()
    assert "\n" not in pruner.summary
    assert pruner.budgets in BUDGETS
    assert 0 <= pruner.depth_share <= 1
    assert not (pruner.needs_gradients and not pruner.needs_activations)


def test_options_survive_a_round_trip_and_are_strict(pruner: Pruner) -> None:
    options = pruner.options
    data = json.loads(json.dumps(options.model_dump(mode="json")))
    assert type(options).model_validate(data) == options
    assert type(pruner)(options).options == options
    config = type(options).model_config
    assert (config.get("extra"), config.get("frozen")) == ("forbid", True)


def test_each_neuron_has_a_finite_score(pruner: Pruner) -> None:
    mlp, found = case()
    scores = pruner.scores(mlp, given_to(pruner, found))
    assert scores.shape == (NEURONS,)
    assert bool(scores.isfinite().all())


@pytest.mark.parametrize("keep", [1, 17, NEURONS - 1, NEURONS])
def test_exactly_so_many_stay_in_order(pruner: Pruner, keep: int) -> None:
    mlp, found = case()
    kept = pruner.select(mlp, given_to(pruner, found), keep)
    assert kept.dtype == torch.int64
    assert len(kept) == keep
    assert 0 <= int(kept.min()) and int(kept.max()) < NEURONS
    assert torch.equal(kept, kept.unique(sorted=True))


def test_what_is_protected_stays(pruner: Pruner) -> None:
    mlp, found = case()
    protected = torch.tensor([31, 3, 4])
    kept = pruner.select(mlp, given_to(pruner, found), 5, protected)
    assert len(kept) == 5
    assert set(protected.tolist()) <= set(kept.tolist())


def test_inputs_are_not_changed(pruner: Pruner) -> None:
    (mlp, found), (same_mlp, same) = case(), case()
    given = given_to(pruner, found)
    pruner.scores(mlp, given)
    pruner.select(mlp, given, 17, torch.tensor([2]))
    for one, other in ((mlp, same_mlp), (found, same)):
        for field in fields(one):
            left, right = getattr(one, field.name), getattr(other, field.name)
            if isinstance(left, torch.Tensor):
                assert torch.equal(left, right), field.name


def test_the_same_input_gives_the_same_choice(pruner: Pruner) -> None:
    mlp, found = case()
    first = pruner.select(mlp, given_to(pruner, found), 17)
    torch.manual_seed(99)  # no use of the global generator
    again = type(pruner)(pruner.options)
    assert torch.equal(first, again.select(mlp, given_to(pruner, found), 17))
