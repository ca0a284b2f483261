"""Embedding and head as parts of a plan, calibrated or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixtures import StateDictSource
from model_fixtures import random_model
from pipeline_fixtures import windows
from torch import Tensor

from compress.allocation.database import LevelMaker
from compress.allocation.store import LevelStore
from compress.config.schema import QuantizeSection
from compress.core.artifact import ModelDescription
from compress.core.tensors import QuantizedTensor
from compress.planning.planner import make_plan
from compress.quantizers.gptq import GPTQ
from compress.quantizers.rtn import RoundToNearest
from compress.transform import PlanRunner, part_of_layer
from compress.workdir import WorkDir

WINDOWS = windows(16, 24)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
DENSE = {r"re:.*layers\.": {"scheme": "dense"}}


def runner_of(
    folder: Path,
    model: ModelDescription,
    source: StateDictSource,
    overrides: dict[str, dict[str, str]],
    propagate: str = "quantized",
) -> PlanRunner:
    methods = {"gptq": GPTQ(), "rtn": RoundToNearest()}
    section = {"scheme": "int4-g32", "overrides": overrides}
    plan = make_plan(
        QuantizeSection.model_validate(section),
        model,
        scale_dtype="float32",
        quantizer=methods.__getitem__,
    )
    return PlanRunner(
        model, source, plan, methods, WorkDir(folder), propagate=propagate
    )


def codes_of(runner: PlanRunner, layer: str) -> QuantizedTensor:
    part = part_of_layer(layer, runner.description)
    return runner.workdir.read_layer(part, layer)


def parts(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "blocks").iterdir())


def hidden_at_head(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.model(w[None]).last_hidden_state[0] for w in WINDOWS])


def test_embedding_and_head_are_parts_of_their_own(tmp_path: Path) -> None:
    _, description, source = random_model(tie_word_embeddings=False)
    overrides = {n: {"scheme": "q8_0", "method": "rtn"} for n in (EMBEDDING, HEAD)}
    runner = runner_of(tmp_path, description, source, overrides)
    runner.run(WINDOWS)
    assert parts(tmp_path) == ["0000", "0001", "embeddings", "head"]
    for name in overrides:
        error = codes_of(runner, name).dequantize() - source.state[f"{name}.weight"]
        assert float(error.abs().max()) < 0.01


@pytest.mark.parametrize("tied", [False, True])
def test_feedback_on_the_head_keeps_its_outputs(tied: bool, tmp_path: Path) -> None:
    model, description, source = random_model(tie_word_embeddings=tied)
    name = EMBEDDING if tied else HEAD
    x, weight = hidden_at_head(model), source.state[f"{name}.weight"]
    lost = {}
    for method in ("rtn", "gptq"):
        folder = tmp_path / method
        overrides = {name: {"scheme": "int3-g32", "method": method}, **DENSE}
        runner = runner_of(folder, description, source, overrides)
        assert runner.needs_calibration == (method == "gptq")
        runner.run(WINDOWS if runner.needs_calibration else None)
        error = codes_of(runner, name).dequantize() - weight
        lost[method] = float((x @ error.T).square().sum())
        record = runner.workdir.records(part_of_layer(name, description))[name]
        assert (record["tokens"] == WINDOWS.numel()) == (method == "gptq")
    assert lost["gptq"] < 0.8 * lost["rtn"]


@pytest.mark.parametrize("propagate", ["quantized", "fp"])
def test_blocks_are_calibrated_on_the_coded_embedding(
    propagate: str, tmp_path: Path
) -> None:
    _, description, source = random_model(tie_word_embeddings=False)
    overrides = {EMBEDDING: {"scheme": "int2-g32", "method": "rtn"}}
    runner = runner_of(tmp_path / "a", description, source, overrides, propagate)
    runner.run(WINDOWS)
    coded = StateDictSource(dict(source.state))
    coded.state[f"{EMBEDDING}.weight"] = codes_of(runner, EMBEDDING).dequantize()
    other = runner_of(tmp_path / "b", description, coded, {}, propagate)
    for quantizer in (runner.quantizers, other.quantizers):
        quantizer["gptq"].options = GPTQ.Options(drift=0.0)  # type: ignore[index]
    again = runner_of(tmp_path / "c", description, source, overrides, propagate)
    again.quantizers = other.quantizers
    again.run(WINDOWS)
    other.run(WINDOWS)
    layer = "model.layers.0.self_attn.q_proj"
    same = torch.equal(codes_of(again, layer).codes, codes_of(other, layer).codes)
    assert same == (propagate == "quantized")


def test_a_run_that_lost_its_head_makes_the_same_again(tmp_path: Path) -> None:
    _, description, source = random_model(tie_word_embeddings=False)
    overrides = {n: {"scheme": "int4-g32"} for n in (EMBEDDING, HEAD)}
    runner = runner_of(tmp_path, description, source, overrides)
    runner.run(WINDOWS)
    before = codes_of(runner, HEAD)
    for part in ("head", "0001"):
        (tmp_path / "blocks" / f"{part}.safetensors").unlink()
    runner.run(WINDOWS)
    assert torch.equal(codes_of(runner, HEAD).codes, before.codes)


@pytest.mark.parametrize("tied", [False, True])
def test_levels_of_the_ends_are_what_the_method_makes(
    tied: bool, tmp_path: Path
) -> None:
    _, description, source = random_model(tie_word_embeddings=tied)
    name = EMBEDDING if tied else HEAD
    overrides = {name: {"scheme": "int4-g32"}, **DENSE}
    runner = runner_of(tmp_path / "run", description, source, overrides)
    runner.run(WINDOWS)
    store = LevelStore(tmp_path / "levels")
    maker = LevelMaker(description, source, runner.quantizers, store, "test")
    layer = runner.plan.layers[name]
    found = maker.make([layer], WINDOWS)[layer]
    codes = store.read(found.key).codes
    assert torch.equal(codes, codes_of(runner, name).codes)
    record = runner.workdir.records(part_of_layer(name, description))[name]
    assert found.error == pytest.approx(record["error"])


@pytest.mark.parametrize("tied", [False, True])
def test_calibration_makes_a_coded_embedding_cost_less(
    tied: bool, tmp_path: Path
) -> None:
    model, description, source = random_model(tie_word_embeddings=tied)
    with torch.no_grad():
        dense = torch.log_softmax(model(WINDOWS).logits, -1)
    lost = {}
    for method in ("rtn", "gptq"):
        overrides = {EMBEDDING: {"scheme": "int4-g32", "method": method}, **DENSE}
        runner = runner_of(tmp_path / method, description, source, overrides)
        runner.run(WINDOWS if runner.needs_calibration else None)
        values = codes_of(runner, EMBEDDING).dequantize()
        model.load_state_dict(source.state, strict=False)
        model.model.embed_tokens.weight.data = values
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        with torch.no_grad():
            coded = torch.log_softmax(model(WINDOWS).logits, -1)
        lost[method] = float((dense.exp() * (dense - coded)).sum(-1).mean())
    assert lost["gptq"] < 0.8 * lost["rtn"]
