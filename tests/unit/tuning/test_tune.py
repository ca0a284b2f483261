"""Tuning lowers held-out KL, keeps the best state, and can be broken off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tuning_fixtures import (
    coded_student,
    divergence_of,
    kill_after,
    options_of,
    save_teacher,
    tuned_codes,
)

from compress.core.errors import ConfigError
from compress.recovery.models import WholeModel
from compress.tuning.tune import Tuned, changed_share

SCHEMES = ("int2-g32", "palette2", "aqlm-2x4g4")


def tuned(
    folder: Path, scheme: str = "int2-g32", *, kind: str = "llama", **changes: Any
) -> Tuned:
    return tuned_codes(folder, scheme, options_of(**changes), kind=kind)


def same(a: Tuned, b: Tuned) -> bool:
    pairs = [(a.codes[n].state(), b.codes[n].state()) for n in a.codes]
    pairs.append((dict(a.dense), dict(b.dense)))
    return all(torch.equal(x[k], y[k]) for x, y in pairs for k in x)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_held_out_divergence_falls_and_codes_help(tmp_path: Path, scheme: str) -> None:
    """On a trained model, few codes with their numbers beat the numbers alone."""
    common = {"steps": 100, "batch": 16, "evaluations": 4}
    p = tuned(tmp_path, scheme, regime="p", **common).record
    pv = tuned(tmp_path, scheme, code_learning_rate=0.02, **common).record
    assert p["kl_before"] == pv["kl_before"]
    assert p["kl_after"] < 0.95 * p["kl_before"]
    assert pv["kl_after"] < 0.8 * p["kl_after"]
    assert p["changed_codes"] == 0 < pv["changed_codes"] < 0.5
    assert pv["layers"] == 21 and pv["dense_weights"] == 7
    assert [e["step"] for e in pv["evaluations"]] == [0, 25, 50, 75, 100]


def test_a_coded_embedding_is_tuned_as_the_tied_head_too(tmp_path: Path) -> None:
    options = options_of(embeddings=True, code_learning_rate=0.02, steps=60)
    found = tuned_codes(tmp_path, "int3-g32", options, embedding=True)
    assert found.record["layers"] == 22 and found.record["dense_weights"] == 7
    assert found.record["kl_after"] < 0.8 * found.record["kl_before"]
    kl = divergence_of(found, tmp_path, "int3-g32", embedding=True)
    assert kl == pytest.approx(found.record["kl_after"], rel=1e-4)
    _, codes = coded_student(save_teacher(tmp_path), "int3-g32", embedding=True)
    name = next(name for name in codes if "embed" in name)
    assert 0 < changed_share({name: codes[name]}, {name: found.codes[name]}) < 0.5


@pytest.mark.parametrize("scheme", ["int3-g32-asym", "int4-g32-offset", "fp4-g32"])
def test_other_grids_are_tuned_too(tmp_path: Path, scheme: str) -> None:
    record = tuned(tmp_path, scheme, steps=40, code_learning_rate=0.02).record
    assert record["kl_after"] < 0.9 * record["kl_before"]


def test_what_is_returned_is_what_was_measured(tmp_path: Path) -> None:
    found = tuned(tmp_path, "aqlm-2x4g4", code_learning_rate=0.02)
    kl = divergence_of(found, tmp_path, "aqlm-2x4g4")
    assert kl == pytest.approx(found.record["kl_after"], rel=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("regime", ["pv", "p"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, regime: str
) -> None:
    options = {
        "regime": regime,
        "checkpoint_minutes": 0.0,
        "generated": 6,
        "code_learning_rate": 0.05,
        "beam": 2,
    }
    whole = tuned(tmp_path, scheme, **options)
    with monkeypatch.context() as patched:
        kill_after(patched, 2)
        with pytest.raises(KeyboardInterrupt):
            tuned(tmp_path, scheme, **options)
    resumed = tuned(tmp_path, scheme, **options)
    assert same(whole, resumed)
    curves = [
        [(e["step"], e["kl"], e.get("loss")) for e in run.record["evaluations"]]
        for run in (whole, resumed)
    ]
    assert curves[0] == curves[1]
    assert not (tmp_path / "state" / "training.safetensors").exists()


def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        kill_after(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            tuned(tmp_path, checkpoint_minutes=0.0)
    with pytest.raises(ConfigError, match="options changed since it began"):
        tuned(tmp_path, beam=2)


def test_kept_states_of_the_teacher_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]
    states = WholeModel.states

    def counted(self: WholeModel, ids: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return states(self, ids)

    monkeypatch.setattr(WholeModel, "states", counted)
    # 256 windows, 32 a step: the first 8 of 20 steps see each for the first time.
    options = {"steps": 20, "batch": 32, "evaluations": 2}
    computed = tuned(tmp_path, **options)
    without, calls[0] = calls[0], 0
    kept = tuned(tmp_path, teacher="cache", **options)
    assert without - calls[0] == 12
    assert kept.record["kl_after"] == pytest.approx(
        computed.record["kl_after"], rel=1e-3
    )


def test_states_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 1000)
    with pytest.raises(ConfigError, match="set teacher: recompute"):
        tuned(tmp_path, teacher="cache")


def test_seeds_decide_the_result(tmp_path: Path) -> None:
    options = {"code_learning_rate": 0.05}
    first = tuned(tmp_path, **options)
    assert same(first, tuned(tmp_path, **options))
    assert not same(first, tuned(tmp_path, seed=1, **options))


def test_the_best_state_is_kept_when_tuning_spoils_the_model(tmp_path: Path) -> None:
    found = tuned(
        tmp_path, steps=40, learning_rate=3.0, evaluations=40, patience=3
    ).record
    assert found["steps"] < 40
    assert found["kl_after"] <= found["kl_before"]


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain = tuned(tmp_path, steps=10).record
    saved = tuned(tmp_path, steps=10, gradient_checkpointing=True).record
    assert saved["kl_after"] == pytest.approx(plain["kl_after"], rel=1e-4)


def test_compiled_passes_tune_the_same(tmp_path: Path) -> None:
    given: dict[str, Any] = {"steps": 4, "embeddings": True, "regime": "p"}
    plain = tuned(tmp_path, **given).record
    found = tuned(tmp_path, compile=True, **given).record
    assert found["kl_after"] == pytest.approx(plain["kl_after"], rel=1e-3)
    assert found["kl_after"] < found["kl_before"]


@pytest.mark.parametrize("kind", ["gemma2", "qwen3", "qwen2"])
def test_families_with_rules_of_their_own_are_tuned(tmp_path: Path, kind: str) -> None:
    found = tuned(tmp_path, kind=kind, code_learning_rate=0.02, steps=40).record
    assert found["kl_after"] < found["kl_before"]


def test_products_in_bfloat16_tune_too(tmp_path: Path) -> None:
    options = {"dtype": "bfloat16", "code_learning_rate": 0.02, "steps": 60}
    found = tuned(tmp_path, embeddings=True, **options).record
    assert found["kl_after"] < 0.8 * found["kl_before"]
    assert found["dtype"] == "bfloat16"


def test_the_share_of_changed_codes_counts_units(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path)
    _, codes = coded_student(teacher, "aqlm-2x4g4")
    name = next(iter(codes))
    changed = codes[name].codes.clone()
    changed[0, :2] ^= 1  # both codes of one unit
    changed[0, 4] ^= 1
    other = {**codes, name: type(codes[name])(**vars(codes[name]) | {"codes": changed})}
    units = sum(tensor.codes.numel() // 2 for tensor in codes.values())
    assert changed_share(codes, other) == pytest.approx(2 / units)
