"""``compress bench model`` on a CPU: generation, figures, tables and the command."""

from __future__ import annotations

import json
import math
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixtures import linears, make_artifact
from model_fixtures import random_model
from typer.testing import CliRunner

from compress.bench import int8_linear, random_models, running
from compress.bench.decoding import Generator
from compress.bench.model import ModelSettings, bench_model
from compress.bench.page import as_page, as_text, write
from compress.cli import app
from compress.core.errors import CheckpointError, ConfigError
from compress.core.inputs import fake_quantize_inputs
from compress.core.scheme import InputScheme
from compress.export.safetensors import SafetensorsExporter, SafetensorsOptions
from compress.runtime.load import load

PROMPT = torch.arange(14).view(2, 7) + 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    artifact = make_artifact(linears("w6a8-g64"), dtype="bfloat16", hidden=128)
    SafetensorsExporter(SafetensorsOptions()).write(artifact, folder)
    return folder


def settings(folder: Path, **changes: Any) -> ModelSettings:
    numbers: dict[str, Any] = {
        **{"ways": ("dense", "served"), "batches": (1, 3)},
        **{"prefill_tokens": 12, "context_tokens": 5},
        **{"new_tokens": 3, "runs": 2, "warm_up": 1, "idle_seconds": 0.0},
    }
    return ModelSettings(folder, **(numbers | changes))


@pytest.fixture(scope="module")
def outcome(folder: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "_LEAST_SECONDS", 0.0)
        return bench_model(settings(folder), apart=False)


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma3_text"]
)
def test_generated_tokens_are_those_of_transformers(kind: str) -> None:
    model, _, _ = random_model(kind)
    expected = model.generate(
        PROMPT, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None
    )[:, PROMPT.shape[1] :]
    with torch.inference_mode():
        generator = Generator(model, PROMPT, 6)
        for _ in range(2):  # the second time after a rewind
            generator.prefill()
            found = [generator.ids.clone()]
            for _ in range(5):
                generator.step()
                found.append(generator.ids.clone())
            assert torch.equal(torch.cat(found, 1), expected)


def test_both_ways_are_measured(outcome: dict[str, Any]) -> None:
    dense, served = outcome["ways"]
    assert (dense["label"], served["label"]) == (
        "float32, decoded weights",
        "w6a8-g64 in float32",
    )
    assert dense["device"].startswith("CPU, ")
    assert dense["params"] == served["params"]
    assert served["weights_bytes"] < 0.6 * dense["weights_bytes"]
    assert outcome["errors"] == {} and outcome["mcr"] is None
    for way in outcome["ways"]:
        assert way["prefill"]["tok_s"] > 0
        assert [found["batch"] for found in way["requests"]] == [1, 3]
        for found in way["requests"]:
            assert found["it_tok_s"] == found["batch"] / found["itl_s"]["median"]
            assert found["generated_tokens"] % (3 * found["batch"]) == 0
            assert found["al_s"] > found["ttft_s"]["p25"]
            assert not found["cuda_graph"]


def test_counts_are_those_of_the_model(folder: Path) -> None:
    model = load(folder)
    served = load(folder, as_served=True)
    expected = sum(p.numel() for p in model.parameters())
    assert running.parameter_count(served) == expected
    linear = expected - sum(p.numel() for p in model.parameters() if p.dim() == 1)
    linear -= model.get_input_embeddings().weight.numel()
    assert running.multiplied_count(served) == linear
    assert running.multiplied_count(model) == linear
    assert running.weights_bytes(model) >= 4 * expected


def test_a_folder_without_codes_is_measured_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_LEAST_SECONDS", 0.0)
    model, _, _ = random_model("llama")
    model.save_pretrained(tmp_path)
    found = bench_model(settings(tmp_path, batches=(1,)), apart=False)
    assert [way["way"] for way in found["ways"]] == ["dense"]
    assert "no layer has 6-bit weights" in found["errors"]["served"]
    assert "WARNING: served" in as_text(found)


def test_memory_that_does_not_suffice_is_a_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(running, "_requests", refuse)
    found = bench_model(settings(folder), apart=False)
    row = found["ways"][0]["requests"][1]
    assert row == {"batch": 3, "error": "CUDA out of memory. Tried to allocate"}
    assert "out of memory" in as_text(found)
    assert found["over_dense"]["served"]["it_tok_s"] == {}


def test_a_known_shape_needs_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {
        **{"vocab_size": 64, "hidden_size": 128, "intermediate_size": 192},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        "tie_word_embeddings": True,
    }
    monkeypatch.setitem(random_models.SHAPES, "tiny", tiny)
    monkeypatch.setattr(running, "_LEAST_SECONDS", 0.0)
    found = bench_model(settings(Path("random:tiny"), batches=(1,)), apart=False)
    dense, served = found["ways"]
    assert dense["label"] == "float32, random weights"
    assert served["label"] == "w6a8-g128, w6a8-g64 in float32"
    assert (
        dense["params"]
        == served["params"]
        == 64 * 128 + 5 * 128 + 2 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 192)
    )
    assert found["errors"] == {}


def test_int8_layers_take_the_places_of_all_but_the_head(folder: Path) -> None:
    dense, coded = load(folder), int8_linear.with_int8_(load(folder))
    assert running.parameter_count(coded) == running.parameter_count(dense)
    assert running.multiplied_count(coded) == running.multiplied_count(dense)
    replaced = [m for m in coded.modules() if isinstance(m, int8_linear.Int8Linear)]
    assert len(replaced) == 14 and type(coded.lm_head) is torch.nn.Linear


def test_an_int8_layer_is_the_product_of_rounded_numbers() -> None:
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(160, 24), torch.randn(2, 3, 160)
    rule = InputScheme("int8", None)
    weight = fake_quantize_inputs(linear.weight.detach(), rule)  # a scale a row
    expected = fake_quantize_inputs(x, rule) @ weight.t() + linear.bias
    found = int8_linear.Int8Linear(linear)(x)
    assert found.shape == (2, 3, 24)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_random_models_are_finite_and_of_one_scale() -> None:
    name, device = "random:smollm2-135m", torch.device("cpu")
    ids = torch.arange(8)[None]
    norms = []
    for served in (False, True):
        model = random_models.random_model(
            name, dtype=torch.float32, device=device, served=served
        )
        with torch.inference_mode():
            states = model.model(ids).last_hidden_state
            norms.append(model.lm_head(states).norm().item())
    assert all(math.isfinite(norm) and norm > 0 for norm in norms)
    assert 0.5 < norms[0] / norms[1] < 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folder": Path("random:gpt-9")}, "no known shape; there are random:llama"),
        ({"original": Path("somewhere")}, "a random model has no original"),
    ],
)
def test_random_models_that_cannot_be_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    asked = replace(settings(Path("random:llama-2-7b")), **changes)
    with pytest.raises(ConfigError, match=message):
        bench_model(asked)


@pytest.mark.slow
def test_each_way_runs_in_a_process_of_its_own(folder: Path) -> None:
    found = bench_model(settings(folder, batches=(1,)), apart=True)
    assert [way["way"] for way in found["ways"]] == ["dense", "served"]
    assert found["protocol"]["one_process_each"] is True


def test_tables_and_page_say_what_was_measured(
    outcome: dict[str, Any], tmp_path: Path
) -> None:
    text = as_text(outcome)
    assert "served: w6a8-g64 in float32" in text
    assert "MCR was not measured: give --original." in text
    page = as_page(outcome)
    assert "<svg" in page and "Efficiency" in page
    written = write(outcome, tmp_path / "out")
    assert [path.name for path in written] == ["bench-model.json", "bench-model.html"]
    assert json.loads(written[0].read_text())["kind"] == "model"


def test_an_original_gives_the_compression_rate(outcome: dict[str, Any]) -> None:
    data = outcome | {
        **{"mcr": 2.4, "mcr_size_factor": 2.5, "mcr_performance_factor": 0.96}
    }
    assert "MCR 2.400: size 2.500 times performance 0.960." in as_text(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ways": ("dense", "int4")}, "ways are dense, int8, served, not int4"),
        ({"runs": 0}, "runs must be one or more, not 0"),
        ({"batches": (0,)}, "batches must be one or more, not 0"),
        ({"device": "cuda"}, "sees no CUDA device; use --device cpu"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    if torch.cuda.is_available() and "device" in changes:
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match=message):
        bench_model(settings(folder, **changes))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config.json there"):
        bench_model(settings(tmp_path / "nothing"))


def test_the_command_prints_json_and_writes(
    folder: Path, outcome: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    asked: list[ModelSettings] = []

    def stand_in(given: ModelSettings, **_: Any) -> dict[str, Any]:
        asked.append(given)
        return outcome

    monkeypatch.setattr("compress.bench.model.bench_model", stand_in)
    arguments = ["bench", "model", str(folder), "--device", "cpu", "--json"]
    arguments += ["--batch", "2", "--batch", "4", "--new-tokens", "9"]
    arguments += ["--output", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert asked[0].batches == (2, 4) and asked[0].new_tokens == 9
    assert json.loads(result.stdout)["kind"] == "model"
    assert (tmp_path / "bench-model.html").is_file()


def test_a_gpu_gets_larger_settings_than_a_cpu(tmp_path: Path) -> None:
    on_gpu = ModelSettings.for_device(tmp_path, "cuda")
    assert on_gpu.batches == (1, 8, 32) and on_gpu.prefill_tokens == 2048
    for device in ("cpu", "cuda"):
        full = ModelSettings.for_device(tmp_path, device)
        quick = ModelSettings.for_device(tmp_path, device, quick=True)
        assert quick.runs <= full.runs and quick.new_tokens < full.new_tokens


def test_graphs_that_a_model_forbids_are_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _, _ = random_model("llama")
    generator = Generator(model, PROMPT, 2)

    def refuse(_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(generator, "_captured", refuse)
    monkeypatch.setattr(
        torch, "cuda", types.SimpleNamespace(synchronize=lambda _: None)
    )
    generator.capture()
    assert not generator.is_captured
    assert generator.refusal == "operation not permitted when stream is capturing"
