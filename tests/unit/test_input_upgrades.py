"""The rule that gives some inputs finer scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moe_fixtures import opened, save_mixture
from streaming_fixtures import WINDOWS, model_of

from compress.calibration.input_sensitivity import SharedInput
from compress.core.artifact import ModelDescription
from compress.core.plan import LayerPlan, Plan
from compress.core.scheme import InputScheme, Scheme
from compress.evaluation.rounding import rounding_of
from compress.model.streaming import StreamedModel
from compress.planning.input_upgrades import (
    Rating,
    inputs_after,
    proposals,
    shared_inputs,
    with_inputs,
)
from compress.upgrading import Upgrader

TOKEN, GROUP = InputScheme("int8"), InputScheme("int8", 32)


def rating(token: float, group: float | None = None) -> Rating:
    modes = {"token": TOKEN} | ({} if group is None else {"group": GROUP})
    kl = {"token": token, "a16": 0.0} | ({} if group is None else {"group": group})
    return Rating(SharedInput(0, "mlp", ("a", "b"), modes), kl, {})


def plan_of(description: ModelDescription, scheme: str) -> Plan:
    layers = {}
    for name in description.linears():
        shape = description.tensors[f"{name}.weight"].shape
        layers[name] = LayerPlan(
            name, (shape[0], shape[1]), "rtn", Scheme.parse(scheme)
        )
    return Plan("test", layers)


def test_inputs_of_experts_are_not_rated(tmp_path: Path) -> None:
    save_mixture(tmp_path, "qwen3_moe")
    description = opened(tmp_path).description
    found = shared_inputs(plan_of(description, "w8a8"), description)
    names = {name for shared in found for name in shared.layers}
    assert names == {n for n in description.linears() if "self_attn" in n}


def test_only_outliers_are_upgraded_groups_first() -> None:
    ratings = [rating(1, 0.5), rating(1, 0.5), rating(1, 0.5), rating(6, 2)]
    assert proposals(ratings, 5.0) == [{3: "group"}]


def test_what_groups_do_not_cure_stays_exact() -> None:
    ratings = [*[rating(1, 0.5)] * 5, rating(20, 9), rating(9, 2), rating(8, 8)]
    first, second = proposals(ratings, 5.0)
    assert first == {5: "group", 6: "group"}
    assert second == {5: "a16", 6: "group", 7: "a16"}


def test_without_a_finer_mode_an_outlier_stays_exact_at_once() -> None:
    assert proposals([*[rating(1)] * 3, rating(6)], 5.0) == [{3: "a16"}]


def test_an_outlier_that_has_groups_already_stays_exact() -> None:
    grouped = Rating(
        SharedInput(0, "mlp", ("a",), {"group": GROUP}), {"group": 6, "a16": 0.0}, {}
    )
    assert proposals([*[rating(1)] * 3, grouped], 5.0) == [{3: "a16"}]


def test_nothing_is_proposed_without_outliers() -> None:
    assert proposals([rating(1, 0.5), rating(2, 0.5), rating(4, 1)], 5.0) == []


def test_layers_that_share_an_input_are_upgraded_together() -> None:
    ratings = [rating(1, 0.5), rating(9, 1)]
    assert inputs_after(ratings, {1: "group"}) == {"a": GROUP, "b": GROUP}
    assert inputs_after(ratings, {1: "a16"}) == {"a": None, "b": None}


def test_inputs_are_found_by_block_with_the_groups_of_the_weights() -> None:
    _, description, _ = model_of("llama")
    found = shared_inputs(plan_of(description, "w6a8-g32"), description)
    assert len(found) == 4 * description.block_count
    attention = found[0]
    assert [n.rpartition(".")[2] for n in attention.layers] == [
        "q_proj",
        "k_proj",
        "v_proj",
    ]
    assert attention.modes == {"token": TOKEN, "group": GROUP}


@pytest.mark.parametrize("scheme", ["int6-g32", "fp8-w8a8", "nvfp4-w4a4"])
def test_inputs_that_are_no_integers_are_left_alone(scheme: str) -> None:
    _, description, _ = model_of("llama")
    assert shared_inputs(plan_of(description, scheme), description) == []


def test_a_plan_with_other_inputs_has_the_same_weights() -> None:
    _, description, _ = model_of("llama")
    plan = plan_of(description, "w6a8-g32")
    name = description.linears()[0]
    changed = with_inputs(plan, {name: None})
    assert changed.layers[name].scheme == plan.layers[name].scheme.weights
    others = [n for n in plan.layers if n != name]
    assert all(changed.layers[n] == plan.layers[n] for n in others)
    assert Plan.from_json(changed.to_json()) == changed


@pytest.mark.parametrize("scheme", ["w6a8-g32", "w6a8-g32-group"])
def test_an_input_with_massive_values_is_found_and_cured(scheme: str) -> None:
    _, description, source = model_of("llama")
    # One neuron of one block answers ten thousand times as loudly, and its reader
    # hears it as quietly: the same function, but a scale a token is all its own.
    state: dict[str, Any] = source.state
    up, down = (f"model.layers.1.mlp.{which}_proj.weight" for which in ("up", "down"))
    state[up][0] *= 1e4
    state[down][:, 0] /= 1e4
    model = StreamedModel(description, source)
    plan = plan_of(description, scheme)
    upgrade = Upgrader(model, model, plan, WINDOWS, input_amax={}).run(
        factor=50.0, limit=1e-7, draws=20
    )
    # A third of its columns share the loud neuron's group: groups are not enough.
    assert upgrade.inputs == {"model.layers.1.mlp.down_proj": None}
    exact, *rounded, upgraded = upgrade.record["steps"]
    assert exact["kl"] < 1e-9
    names = [step["inputs"] for step in rounded]
    assert names == (["group"] if scheme.endswith("group") else ["token", "group"])
    assert rounded[0]["kl"] >= rounded[-1]["kl"] > 10 * upgraded["kl"]
    assert all(step["kept"] for step in upgrade.record["steps"])


def test_nothing_is_rated_where_a_scale_a_token_is_enough() -> None:
    _, description, source = model_of("llama")
    model = StreamedModel(description, source)
    plan = plan_of(description, "w6a8-g32")
    upgrade = Upgrader(model, model, plan, WINDOWS, input_amax={}).run(
        factor=5.0, limit=0.5
    )
    assert upgrade.inputs == {}
    assert upgrade.record["inputs"] == []


def test_finer_activations_order_as_in_flexq() -> None:
    _, description, source = model_of("llama")
    model = StreamedModel(description, source)
    p = torch.stack(list(model.logits(WINDOWS))).log_softmax(-1)
    found = {}
    for scheme in ("w6a8-g32-group", "w6a8-g32", "w6a6-g32-group", "w6a6-g32"):
        layers = plan_of(description, scheme).layers
        inputs = {name: layer.scheme.inputs for name, layer in layers.items()}
        rounded = model.with_source(source, rounding=rounding_of(inputs, {}))
        q = torch.stack(list(rounded.logits(WINDOWS))).log_softmax(-1)
        found[scheme] = float((p.exp() * (p - q)).sum(-1).mean())
    assert sorted(found, key=lambda name: found[name]) == list(found)
