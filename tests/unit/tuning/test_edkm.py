"""Weights learn through soft palettes; what is measured and kept are codes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from streaming_fixtures import model_of
from torch import Tensor
from tuning_fixtures import (
    coded_student,
    divergence_of,
    kill_after,
    tuned_codes,
)

from compress.config.tune_section import EdkmOptions
from compress.core.scheme import Scheme
from compress.distributed.team import Team
from compress.model.loading import ModelHandle
from compress.recovery.models import WholeModel
from compress.tuning.edkm import EdkmTuner
from compress.tuning.tune import Tuned, problem_of

SCHEMES = ("palette2", "palette3-tensor-scaled", "palette-2x4")
STEPS = 20


def options_of(**changes: Any) -> EdkmOptions:
    values: dict[str, Any] = {
        "steps": STEPS,
        "batch": 8,
        "evaluations": 4,
        "dtype": "float32",
        "weight_learning_rate": 1e-2,
    }
    return EdkmOptions(**(values | changes))


def tuned(folder: Path, scheme: str = "palette2", **changes: Any) -> Tuned:
    return tuned_codes(folder, scheme, options_of(**changes))


@cache
def handle() -> ModelHandle:
    _, description, source = model_of("llama", tied=True)
    return ModelHandle(description, source)


def tuner(scheme: str = "palette2", **changes: Any) -> EdkmTuner:
    student, codes = coded_student(handle(), scheme)
    model = WholeModel(student, device="cpu", dtype=torch.float32)
    source = handle().source
    return EdkmTuner(model, student.source, source, codes, options_of(**changes))


def step(tuned: EdkmTuner, number: int, *, used: float | None = None) -> Tensor:
    """Take a step with random gradients."""
    tuned.ready((number + 0.5) / STEPS if used is None else used)
    generator = torch.Generator().manual_seed(number)
    for stack in tuned.stacks:
        stack.gradient.copy_(torch.randn(stack.gradient.shape, generator=generator))
    for weight in tuned.dense_weights:
        weight.live.grad = torch.randn(weight.live.shape, generator=generator)
    return tuned.step(1.0, number=number, team=Team())


def live(tuned: EdkmTuner) -> dict[str, Tensor]:
    module = tuned.model.module
    names = [name for stack in tuned.stacks for name in stack.names]
    return {
        name: module.get_submodule(name).get_parameter("weight").detach()
        for name in names
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_held_out_divergence_falls(tmp_path: Path, scheme: str) -> None:
    record = tuned(tmp_path, scheme, steps=60, batch=16).record
    assert record["method"] == "edkm"
    assert record["kl_after"] < 0.6 * record["kl_before"]
    assert record["layers"] == 21 and record["dense_weights"] == 7
    assert 0 < record["changed_codes"] <= 1
    assert [e["step"] for e in record["evaluations"]] == [0, 15, 30, 45, 60]


def test_what_is_returned_is_what_was_measured(tmp_path: Path) -> None:
    found = tuned(tmp_path)
    assert found.record["best_step"] > 0
    kl = divergence_of(found, tmp_path, "palette2")
    assert kl == pytest.approx(found.record["kl_after"], rel=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("steps", [3, STEPS])
def test_the_measured_model_computes_with_what_is_stored(
    scheme: str, steps: int
) -> None:
    """To the last bit, while weights are soft and when codes are fixed."""
    tuned = tuner(scheme)
    for number in range(steps):
        step(tuned, number)
    tuned.as_stored()
    weights = live(tuned)
    for name, tensor in tuned.result().items():
        assert torch.equal(weights[name], tensor.dequantize()), name


def test_the_start_is_measured_as_it_was_calibrated() -> None:
    tuned = tuner()
    _, codes = coded_student(handle(), "palette2")
    tuned.as_stored()
    for name, weight in live(tuned).items():
        assert torch.equal(weight, codes[name].dequantize())


def test_soft_weights_lie_near_the_originals_and_harden() -> None:
    """They start between the dense weights and the entries, and end at entries."""
    tuned = tuner(softness=0.5, last_softness=1e-6)
    gaps = []
    for used in (0.0, 0.79):
        tuned.ready(used)
        soft = {name: weight.clone() for name, weight in live(tuned).items()}
        tuned.as_stored()
        hard = live(tuned)
        off = sum(float((soft[n] - hard[n]).square().sum()) for n in soft)
        gaps.append(off)
    # Where rounding of tables to float16 moves a border across a weight, the code is
    # the neighbour's: some 2^-11 of a gap beside each border.
    assert gaps[1] < 1e-2 * gaps[0]


def test_measuring_changes_nothing_of_the_training() -> None:
    plain, measured = tuner(), tuner()
    for number in range(4):
        step(plain, number)
        step(measured, number)
        measured.as_stored()
    a, b = plain.memory(), measured.memory()
    assert all(torch.equal(a[name], b[name]) for name in a | b)


def test_codes_are_fixed_once_and_tables_learn_on() -> None:
    tuned = tuner()
    step(tuned, 0)
    step(tuned, 1, used=0.85)
    before = [stack.codes.codes.clone() for stack in tuned.stacks]
    tables = [stack.codes.state()["tables"].clone() for stack in tuned.stacks]
    step(tuned, 2, used=0.9)
    for stack, codes, old in zip(tuned.stacks, before, tables, strict=True):
        assert torch.equal(stack.codes.codes, codes)
        assert not torch.equal(stack.codes.state()["tables"], old)
    assert not [name for name in tuned.memory() if "master" in name]


def test_each_phase_has_a_curve_of_the_rate() -> None:
    tuned = tuner(table_share=0.2)
    assert [tuned.ready(used) for used in (0.0, 0.4)] == [0.0, 0.5]
    assert tuned.ready(0.9) == pytest.approx(0.5)
    assert tuned.ready(1.0) == pytest.approx(1.0)


@pytest.mark.parametrize("used", [0.1, 0.9])
def test_gradients_that_are_not_finite_change_nothing(used: float) -> None:
    tuned = tuner()
    step(tuned, 0, used=used)
    tuned.ready(used)
    before = tuned.snapshot() | {
        k: v.clone() for k, v in tuned.memory().items() if "master/" in k
    }
    for stack in tuned.stacks:
        stack.gradient.fill_(1.0)
    tuned.stacks[0].gradient[0, 0, 0] = torch.nan
    flags = tuned.step(1.0, number=1, team=Team())
    assert flags.tolist() == [1.0, 0.0]
    after = tuned.snapshot() | tuned.memory()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("saves", [1, 4], ids=["soft", "fixed"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, saves: int
) -> None:
    options: dict[str, Any] = {
        "checkpoint_minutes": 0.0,
        "table_share": 0.4,
        "evaluations": 5,
    }
    whole = tuned(tmp_path, scheme, **options)
    with monkeypatch.context() as patched:
        kill_after(patched, saves)
        with pytest.raises(KeyboardInterrupt):
            tuned(tmp_path, scheme, **options)
    resumed = tuned(tmp_path, scheme, **options)
    pairs = [(whole.codes[n].state(), resumed.codes[n].state()) for n in whole.codes]
    pairs.append((dict(whole.dense), dict(resumed.dense)))
    assert all(torch.equal(x[k], y[k]) for x, y in pairs for k in x)
    curves = [
        [(e["step"], e["kl"], e.get("loss")) for e in run.record["evaluations"]]
        for run in (whole, resumed)
    ]
    assert curves[0] == curves[1]


def test_checkpoints_of_blocks_and_several_passes_change_nothing(
    tmp_path: Path,
) -> None:
    whole = tuned(tmp_path, steps=8).record
    parts = tuned(
        tmp_path, steps=8, batch=4, accumulate=2, gradient_checkpointing=True
    ).record
    assert parts["kl_after"] == pytest.approx(whole["kl_after"], rel=1e-3)


def test_the_start_is_kept_when_training_spoils_the_model(tmp_path: Path) -> None:
    found = tuned(tmp_path, weight_learning_rate=0.5, learning_rate=0.5)
    assert found.record["best_step"] == 0
    assert found.record["kl_after"] == found.record["kl_before"]
    assert found.record["changed_codes"] == 0


@pytest.mark.parametrize("scheme", ["int4-g32", "aqlm-2x8g8", "fp4-g32"])
def test_schemes_without_one_table_are_refused(scheme: str) -> None:
    problem = problem_of(options_of(), Scheme.parse(scheme), (64, 64))
    assert problem is not None and "palettes with one table" in problem
    assert problem_of(options_of(), Scheme.parse("palette3"), (64, 64)) is None


def test_softness_has_to_fall() -> None:
    with pytest.raises(ValidationError, match="it has to fall"):
        options_of(softness=0.01, last_softness=0.1)
