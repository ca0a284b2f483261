"""Runs whose model rounds its inputs, or keeps its cache in few bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import config_of, save_checkpoint, windows, write_text
from transformers import AutoModelForCausalLM

import compress
from compress import serving
from compress.core.errors import CompressError, ConfigError
from compress.core.plan import Plan
from compress.pipeline import Run

CACHE = {"scheme": "fp8", "strategy": "attn_head", "samples": 4, "windows": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    save_checkpoint(folder / "model", head_dim=32)
    write_text(folder)
    return folder


def settings(place: Path, name: str, **changes: Any) -> dict[str, Any]:
    return config_of(
        place / "model", place / "text.txt", place / name, export=None, **changes
    )


@pytest.fixture(scope="module")
def full(place: Path) -> Any:
    config = settings(
        place,
        "full",
        quantize={
            "scheme": "w6a6-g32",
            "method": "rtn",
            "upgrade_inputs": {"samples": 4, "factor": 1.5, "limit": 1e-9},
        },
        kv_cache=CACHE,
    )
    return compress.run(config)


def test_figures_of_weights_inputs_and_cache_stand_apart(full: Any) -> None:
    metrics = full.report["metrics"]
    weights, both, all_ = (
        metrics[part]["kl"] for part in ("weights_only", "compressed", "with_cache")
    )
    assert 0 < weights < both
    assert all_ != both


def test_upgrades_change_the_plan_and_not_the_codes(full: Any) -> None:
    record = full.report["inputs"]
    upgraded = {
        name: entry["mode"] for entry in record["inputs"] for name in entry["layers"]
    }
    plan = Plan.from_json((full.workdir / "plan.json").read_text("utf-8"))
    for name, layer in plan.layers.items():
        inputs, mode = layer.scheme.inputs, upgraded[name]
        assert layer.scheme.bits == 6
        if mode == "a16":
            assert inputs is None
        else:
            assert inputs is not None
            assert inputs.group_size == (32 if mode == "group" else None)
    assert set(upgraded.values()) != {"token"}
    kinds = {layer["scheme"] for layer in full.report["layers"]}
    assert kinds == {layer.scheme.name for layer in plan.layers.values()}


def test_every_cache_type_is_measured_and_one_recommended(full: Any) -> None:
    cache = full.report["kv_cache"]
    by_name = {entry["type"]: entry for entry in cache["types"]}
    assert "fp8/fp8" in by_name
    assert by_name["q8_0/q8_0"]["kl"] < by_name["q4_0/q4_0"]["kl"]
    # 2 blocks, 2 heads, 32 values, keys and values in two bytes each
    assert by_name["q4_0/q4_0"]["bytes_per_token_f16"] == 2 * 2 * 32 * 2 * 2
    assert by_name["q8_0/q8_0"]["bytes_per_token"] == 2 * 2 * 32 * 2 * 8.5 / 8
    assert cache["recommended"]["llamacpp_flags"].startswith("--cache-type-k ")


@pytest.mark.parametrize("kind", ["md", "html"])
def test_the_report_says_all_of_it(full: Any, kind: str) -> None:
    text = (full.workdir / f"report.{kind}").read_text("utf-8")
    for words in ("Weights, inputs and cache", "Key-value cache", "Upgraded: block"):
        assert words in text
    assert "--cache-type-k" in full.summary()


def test_a_finished_run_resumes_without_measuring_again(
    full: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    for name in ("observe", "evaluate_candidates", "measure_types"):
        monkeypatch.setattr(serving, name, fail)
    monkeypatch.setattr(serving.Upgrader, "run", fail)
    again = compress.run(full.report["config"], resume=True)
    for key in ("metrics", "inputs", "kv_cache", "layers"):
        assert again.report[key] == full.report[key]


def test_the_model_for_exports_holds_scales_and_the_final_plan(place: Path) -> None:
    config = compress.config.load_config(
        settings(
            place,
            "nvfp4",
            quantize={"scheme": "nvfp4-w4a4", "method": "rtn"},
            kv_cache=CACHE,
            evaluate=None,
        )
    )
    run = Run(config)
    run.execute(overwrite=False)
    model = run.artifact
    assert model.kv_cache_scheme == {
        "num_bits": 8,
        "type": "float",
        "strategy": "attn_head",
        "symmetric": True,
        "dynamic": False,
    }
    assert len(model.kv_scales) == 4
    assert all(s.shape == (2, 1, 1) for s in model.kv_scales.values())
    assert all(s.dtype == torch.float32 for s in model.kv_scales.values())
    assert model.input_amax.keys() == model.plan.layers.keys()
    attention = [
        model.input_amax[f"model.layers.0.self_attn.{p}_proj"] for p in ("q", "k", "v")
    ]
    assert len(set(attention)) == 1
    layer = next(iter(model.plan.layers))
    assert model.quantized(layer).scheme == model.plan.layers[layer].scheme


UPGRADES = {"samples": 4, "factor": 1.01, "limit": 1e-9}


@pytest.mark.parametrize(
    ("scheme", "transforms", "quantize"),
    [
        ("nvfp4-w4a4", ["rotation"], {}),
        ("w6a8-g32-group", ["rotation"], {"upgrade_inputs": UPGRADES}),
        ("fp8-w8a8", [], {}),
    ],
)
def test_a_written_folder_is_evaluated_as_the_run_was(
    place: Path, scheme: str, transforms: list[str], quantize: dict[str, Any]
) -> None:
    text = str(place / "text.txt")
    config = settings(
        place,
        scheme,
        transforms=transforms,
        quantize={"scheme": scheme, "method": "rtn", **quantize},
        kv_cache=CACHE,
    )
    config["export"] = [{"format": "safetensors"}]
    run = compress.run(config)
    metrics = compress.evaluate(
        run.workdir / "export" / "safetensors",
        base=place / "model",
        texts=[text],
        windows=2,
        sequence_length=32,
    )
    for part, key in (("with_cache", "texts"), ("weights_only", "weights_only_texts")):
        expected = run.report["metrics"][part]["texts"][text]["kl"]
        assert metrics[key][text]["kl"] == pytest.approx(expected, rel=1e-3), part
    alone = compress.evaluate(
        run.workdir / "export" / "safetensors",
        texts=[text],
        windows=2,
        sequence_length=32,
    )
    assert alone["texts"][text]["perplexity"] == pytest.approx(
        metrics["texts"][text]["perplexity"], rel=1e-6
    )


def test_a_model_in_memory_gets_its_static_scales(place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    tokens = windows()
    coded = compress.quantize(model, "nvfp4-w4a4", method="rtn", calibration=tokens)
    seen: list[float] = []
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    layer.register_forward_pre_hook(
        lambda _, inputs: seen.append(float(inputs[0].abs().max()))
    )
    with torch.no_grad():
        model(tokens)
    found = coded.artifact.input_amax["model.layers.1.mlp.down_proj"]
    assert found == pytest.approx(seen[0], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantize": {"scheme": "int6-g32", "upgrade_inputs": {}}},
            "the plan rounds no inputs to integers",
        ),
        ({"kv_cache": {}, "evaluate": None}, "there is nothing to do"),
        ({"kv_cache": {"types": ["fp8"]}}, "is measured with kv_cache.scheme: fp8"),
        ({"kv_cache": {"types": ["q9_0"]}}, "unknown cache type 'q9_0'"),
        (
            {"kv_cache": CACHE, "calibration": {"data": "no/such.txt"}},
            "no/such.txt",
        ),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(
    place: Path, changes: dict[str, Any], message: str
) -> None:
    quantize = {"method": "rtn", **changes.pop("quantize", {})}
    with pytest.raises(CompressError, match=message):
        compress.run(settings(place, "refused", quantize=quantize, **changes))
    assert not (place / "refused").exists()


def test_a_cache_type_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model")  # heads of 16
    text = write_text(tmp_path)
    config = config_of(tmp_path / "model", text, tmp_path / "run", kv_cache={})
    with pytest.raises(ConfigError, match="heads of 16 values"):
        compress.run(config)
