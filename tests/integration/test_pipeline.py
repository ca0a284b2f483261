"""Whole runs on a tiny model: the report, its figures, and the ways to start one."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from pipeline_fixtures import (
    BOTH,
    Ground,
    call,
    codes_of,
    digests,
    report_of,
    same,
    write_config,
)

import compress
from compress.export.gguf_reader import open_gguf
from compress.model.devices import choose_dtype

REPORT_KEYS = {
    *("version", "model", "config", "config_text", "command", "seed", "date"),
    *("processes", "versions", "hashes", "hardware", "calibration", "size_bytes"),
    *("bits_per_weight", "size_breakdown", "metrics", "transforms", "inputs"),
    *("kv_cache", "layers", "exports", "pruning", "recovery"),
    *("one_plan_two_files", "seconds", "peak_memory_bytes", "predicted", "warnings"),
    *("held_back", "kept_dense"),
    "experts",
    "samples",
    "allocation",
    "tuning",
}


def stored_bytes(path: Path) -> int:
    """Return the bytes of all tensors of a file, its header left out."""
    if path.suffix == ".gguf":
        return sum(tensor.size_bytes for tensor in open_gguf(path).tensors.values())
    with path.open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
    return path.stat().st_size - 8 - header


def test_the_report_has_all_its_keys(full: Path) -> None:
    report = report_of(full)
    assert set(report) == REPORT_KEYS
    assert report["model"]["blocks"] == 2
    assert report["command"].split()[0] == "compress"
    assert {"model", "calibration", "quantize", "plan"} <= set(report["hashes"])
    assert report["calibration"]["tokens"] == 8 * 32
    dtype = choose_dtype("auto", report["model"]["dtype"], "cpu")
    assert f"torch.{report['calibration']['dtype']}" == str(dtype)
    stages = {"load", "quantize", "evaluate", "export safetensors", "export gguf"}
    assert stages <= set(report["seconds"])


def test_each_layer_is_reported(full: Path) -> None:
    layers = report_of(full)["layers"]
    assert len(layers) == 14
    down = next(x for x in layers if x["name"] == "model.layers.1.mlp.down_proj")
    assert (down["block"], down["role"], down["shape"]) == (1, "down", [64, 96])
    assert down["bits_per_weight"] == 4.5
    assert 0 < down["error"] < down["weight_error"] < 0.1


def test_figures_compare_the_model_with_its_base(full: Path) -> None:
    metrics = report_of(full)["metrics"]
    (figures,) = metrics["compressed"]["texts"].values()
    (base,) = metrics["base"]["texts"].values()
    assert figures["protocol"] == base["protocol"] == "windows2x32"
    assert figures["tokens"] == base["tokens"] == 2 * 31
    assert 0 < figures["kl"] < 1
    ratio = figures["perplexity"] / base["perplexity"]
    assert figures["ppl_ratio"] == pytest.approx(ratio)


def test_a_run_can_be_repeated_from_its_report_alone(
    full: Path, ground: Ground
) -> None:
    report = report_of(full)
    path = ground.folder / "again.yaml"
    path.write_text(report["config_text"])
    again = ground.folder / "again"
    changes = ["--set", f"run.workdir={again}", "--set", "run.verify=false"]
    assert call("run", path, *changes).exit_code == 0
    assert digests(full / "export") == digests(again / "export")
    assert same(codes_of(full), codes_of(again))


def test_the_plan_is_written_as_it_was_carried_out(full: Path) -> None:
    from compress.core.plan import Plan

    plan = Plan.from_json((full / "plan.json").read_text())
    assert [layer["name"] for layer in report_of(full)["layers"]] == list(plan.layers)


def test_each_export_passes_in_its_consumer(full: Path, llama_cpp: None) -> None:
    exports = report_of(full)["exports"]
    assert exports["safetensors"]["verify"]["consumer"] == "transformers"
    assert exports["gguf"]["verify"]["consumer"] == "llama.cpp"
    for entry in exports.values():
        assert entry["verify"]["passed"]
        assert entry["verify"]["kl"] < 1e-5
        assert entry["verify"]["tokens"] == 4 * 255


def test_one_plan_gives_two_files_with_the_same_codes(full: Path) -> None:
    report = report_of(full)
    assert report["one_plan_two_files"] == {"layers": 14, "identical": True}
    for entry in report["exports"].values():
        assert entry["codes"] == {"layers": 14, "identical": True}


def test_reports_are_for_people_too(full: Path) -> None:
    page = (full / "report.html").read_text()
    assert "int4-g32" in (full / "report.md").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_without_evaluation_and_export_there_is_still_a_report(
    ground: Ground,
) -> None:
    report = report_of(ground.run("bare", evaluate=None, export=[]))
    assert report["exports"] == {}
    assert report["metrics"] == {"base": None, "compressed": None}


def test_eval_agrees_on_memory_and_files(
    full: Path, ground: Ground, llama_cpp: None
) -> None:
    (gguf,) = (full / "export" / "gguf").glob("*.gguf")
    expected = report_of(full)["metrics"]["compressed"]["kl"]

    def kl(model: Path) -> float:
        options = ["--base", ground.model, "--text", ground.text]
        sizes = ["--windows", 2, "--sequence-length", 32, "--json"]
        result = call("eval", model, *options, *sizes)
        assert result.exit_code == 0, result.output
        (figures,) = json.loads(result.stdout)["texts"].values()
        return float(figures["kl"])

    assert kl(ground.model) == 0
    assert kl(full / "export" / "safetensors") == pytest.approx(expected, rel=1e-4)
    # llama.cpp rounds activations to 8 bits, which is a part of what it serves.
    assert kl(gguf) == pytest.approx(expected, rel=0.3)


def test_eval_without_a_base_gives_perplexity(ground: Ground) -> None:
    found = compress.evaluate(
        ground.model, texts=[str(ground.text)], windows=2, sequence_length=32
    )
    (figures,) = found["texts"].values()
    assert figures["perplexity"] > 1
    assert "kl" not in figures


def test_inspect_reads_folders_files_and_runs(full: Path, ground: Ground) -> None:
    (gguf,) = (full / "export" / "gguf").glob("*.gguf")
    for path, scheme in (
        (ground.model, "float16"),
        (full, "int4-g32"),
        (full / "export" / "safetensors", "int4-g32"),
        (gguf, "q4_0"),
    ):
        result = call("inspect", path, "--json")
        assert result.exit_code == 0, result.output
        schemes = {row["scheme"] for row in json.loads(result.stdout)["layers"]}
        assert scheme in schemes


def test_a_dry_run_writes_nothing_and_tells_the_exact_sizes(
    full: Path, ground: Ground
) -> None:
    config = write_config(ground.folder / "dry.yaml", ground.config("dry", export=BOTH))
    before = digests(ground.folder)
    result = call("run", config, "--dry-run")
    assert result.exit_code == 0
    assert digests(ground.folder) == before
    assert not (ground.folder / "dry").exists()
    assert "estimated peak memory" in result.stdout
    preview = json.loads(call("plan", config, "--json").stdout)
    sizes = preview["predicted"]["size_bytes"]
    for name in ("safetensors", "gguf"):
        files = [full / f for f in report_of(full)["exports"][name]["files"]]
        kinds = (".safetensors", ".gguf")
        stored = sum(stored_bytes(f) for f in files if f.suffix in kinds)
        assert sizes[name] == sum(preview["size_breakdown"][name].values()) == stored
        assert f"{stored:,}" in result.stdout


def test_a_dry_run_of_a_gguf_file_writes_nothing(full: Path, ground: Ground) -> None:
    (gguf,) = (full / "export" / "gguf").glob("*.gguf")
    config = ground.config("dry", model={"path": str(gguf)}, export=BOTH)
    before = digests(ground.folder)
    assert compress.plan(config).sizes["gguf"] > 0
    assert digests(ground.folder) == before


def test_resident_weights_change_nothing(ground: Ground, full: Path) -> None:
    workdir = ground.run("resident", model={"resident": True}, export=BOTH)
    assert digests(workdir / "export") == digests(full / "export")


def test_propagating_the_dense_model_changes_later_blocks_only(
    ground: Ground, full: Path
) -> None:
    quantize = {"propagate": "fp", "options": {"drift": 0.0}}
    fed = {"propagate": "quantized", "options": {"drift": 0.0}}
    runs = [
        codes_of(ground.run(f"p{i}", quantize=x, export=[]))
        for i, x in enumerate((quantize, fed))
    ]
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    assert torch.equal(*(codes[f"{first}.codes"] for codes in runs))
    assert not torch.equal(*(codes[f"{last}.codes"] for codes in runs))


def test_layers_can_differ_or_stay_dense(ground: Ground) -> None:
    overrides = {
        r"re:.*\.down_proj": {"scheme": "int8-g32"},
        "model.layers.1.self_attn.o_proj": {"scheme": "dense"},
    }
    workdir = ground.run(
        "overrides",
        quantize={"overrides": overrides},
        export=BOTH,
        run={"verify": True},
    )
    report = report_of(workdir)
    schemes = {layer["name"]: layer["scheme"] for layer in report["layers"]}
    assert schemes["model.layers.0.mlp.down_proj"] == "int8-g32"
    assert "model.layers.1.self_attn.o_proj" not in schemes
    assert report["one_plan_two_files"] == {"layers": 13, "identical": True}
    (path,) = (workdir / "export" / "gguf").iterdir()
    tensors = open_gguf(path).tensors
    assert tensors["blk.1.ffn_down.weight"].type == "q8_0"
    assert tensors["blk.1.attn_output.weight"].type == "f16"
