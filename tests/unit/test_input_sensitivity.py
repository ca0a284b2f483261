"""Estimated KL of rounded inputs is what rounding them really costs."""

from __future__ import annotations

import pytest
import torch
from streaming_fixtures import WINDOWS, model_of
from torch import Tensor

from compress.calibration import input_sensitivity
from compress.calibration.input_sensitivity import SharedInput, sensitivities
from compress.core.artifact import ModelDescription
from compress.core.scheme import InputScheme
from compress.evaluation.rounding import rounding_of
from compress.model.streaming import StreamedModel

MODES = {"token": InputScheme("int6"), "group": InputScheme("int6", 16)}


def inputs_of(description: ModelDescription) -> list[SharedInput]:
    family, found = description.family, []
    for block in range(description.block_count):
        readers: dict[str, list[str]] = {}
        for linear in family.linears:
            name = f"{family.block(block)}.{linear.path}"
            readers.setdefault(linear.input, []).append(name)
        found += [SharedInput(block, k, tuple(v), MODES) for k, v in readers.items()]
    return found


def log_p(model: StreamedModel) -> Tensor:
    return torch.stack(list(model.logits(WINDOWS))).double().log_softmax(-1)


def true_kl(model: StreamedModel, shared: SharedInput, mode: str) -> float:
    scheme = shared.modes[mode]
    rounding = rounding_of(dict.fromkeys(shared.layers, scheme), {})
    p = log_p(model)
    q = log_p(model.with_source(model.source, rounding=rounding))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3"])
def test_estimates_agree_with_measurements(kind: str) -> None:
    _, description, source = model_of(kind)
    model = StreamedModel(description, source)
    inputs = inputs_of(description)
    found = sensitivities(model, WINDOWS, inputs, draws=60)
    for shared, table in zip(inputs, found, strict=True):
        for mode, estimate in table.items():
            true = true_kl(model, shared, mode)
            # Four standard errors, and a fifth for what is beyond second order.
            slack = 4 * estimate.error + 0.2 * true
            assert abs(estimate.kl - true) < slack, (shared.name, mode)


def test_the_standard_error_is_that_of_repeated_estimates() -> None:
    _, description, source = model_of("llama")
    model = StreamedModel(description, source)
    inputs = inputs_of(description)[:1]
    runs = [sensitivities(model, WINDOWS, inputs, draws=20, seed=s) for s in range(12)]
    values = torch.tensor([run[0]["token"].kl for run in runs])
    claimed = torch.tensor([run[0]["token"].error for run in runs]).mean()
    # The spread of 12 values is known to a factor of two, well within three.
    assert claimed / 3 < values.std() < claimed * 3


def test_taking_windows_in_parts_changes_nothing_but_the_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, description, source = model_of("llama")
    model = StreamedModel(description, source)
    inputs = inputs_of(description)
    whole = sensitivities(model, WINDOWS, inputs, draws=1)
    monkeypatch.setattr(input_sensitivity, "_STORED_BYTES", 1)
    monkeypatch.setattr(input_sensitivity, "_TOKENS_A_CALL", 1)
    parts = sensitivities(model, WINDOWS, inputs, draws=1)
    for a, b in zip(whole, parts, strict=True):
        assert a["token"].kl == pytest.approx(b["token"].kl, rel=1e-3)
