"""Whole runs on a tiny model: files, report, figures, and the ways to start one."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import (
    call,
    config_of,
    digests,
    save_checkpoint,
    windows,
    write_config,
    write_text,
)
from safetensors.torch import load_file

import compress
from compress.export.gguf_reader import open_gguf

GGUF = {"format": "gguf", "embedding": "f16"}
BOTH = [{"format": "safetensors"}, GGUF]
REPORT_KEYS = {
    *("version", "model", "config", "config_text", "command", "seed", "date"),
    *("versions", "hashes", "hardware", "calibration", "size_bytes"),
    *("bits_per_weight", "size_breakdown", "metrics", "layers", "exports"),
    *("one_plan_two_files", "seconds", "peak_memory_bytes", "predicted", "warnings"),
}


@dataclass(frozen=True)
class Ground:
    """A checkpoint, a text, and a place for runs."""

    folder: Path
    model: Path
    text: Path

    def config(self, name: str, **changes: Any) -> dict[str, Any]:
        return config_of(self.model, self.text, self.folder / name, **changes)

    def run(self, name: str, **changes: Any) -> Path:
        """Run a config; returns its work directory."""
        return compress.run(self.config(name, **changes)).workdir


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("pipeline")
    save_checkpoint(folder / "tiny", dtype=torch.float16, shard="100KB")
    return Ground(folder, folder / "tiny", write_text(folder))


@pytest.fixture(scope="module")
def full(ground: Ground) -> Path:
    """A run from a YAML file through the command line, to both formats, verified."""
    config = ground.config("full", export=BOTH, run={"verify": True})
    result = call("run", write_config(ground.folder / "full.yaml", config))
    assert result.exit_code == 0, result.output
    return ground.folder / "full"


@pytest.fixture
def llama_cpp() -> None:
    pytest.importorskip("llama_cpp")


def report_of(workdir: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((workdir / "report.json").read_text())
    return report


def codes_of(workdir: Path) -> dict[str, torch.Tensor]:
    """Return codes, scales and zeros of all checkpoints of a run."""
    found = {}
    for path in sorted((workdir / "blocks").iterdir()):
        found |= load_file(path)
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def weights_of(folder: Path) -> dict[str, bytes]:
    """Return the weight files of an export by name."""
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(ids).logits
    return logits


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


def test_stock_transformers_loads_the_export(full: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = full / "export" / "safetensors"
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = windows()
    expected = logits_of(compress.load(folder), ids)
    assert torch.allclose(logits_of(stock, ids), expected, atol=1e-2)
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_the_loaded_export_is_the_model_with_its_codes(
    full: Path, ground: Ground
) -> None:
    from transformers import AutoModelForCausalLM

    from compress.workdir import WorkDir

    model = AutoModelForCausalLM.from_pretrained(ground.model, dtype=torch.float32)
    work = WorkDir(full)
    for layer in report_of(full)["layers"]:
        values = work.read_layer(f"{layer['block']:04d}", layer["name"]).dequantize()
        model.get_submodule(layer["name"]).weight.data = values
    ids = windows()
    loaded = compress.load(full / "export" / "safetensors")
    assert torch.allclose(logits_of(loaded, ids), logits_of(model, ids), atol=1e-5)


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


@pytest.mark.parametrize(
    ("method", "scheme"), [("rtn", "int3-g32-asym"), ("gptq", "int4-g32")]
)
def test_in_memory_and_from_disk_are_the_same_byte_for_byte(
    ground: Ground, method: str, scheme: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from compress.calibration.data import load_tokens

    workdir = ground.run(
        f"disk-{method}", quantize={"method": method, "scheme": scheme}
    )
    model = AutoModelForCausalLM.from_pretrained(ground.model)
    tokenizer = AutoTokenizer.from_pretrained(ground.model)
    tokens = load_tokens(
        str(ground.text), tokenizer, samples=8, sequence_length=32, seed=0
    ).tokens
    found = compress.quantize(
        model, scheme, method=method, calibration=tokens, tokenizer=tokenizer
    )
    folder = ground.folder / f"memory-{method}"
    written = found.save(folder)
    flat = {
        f"{name}.{key}": value
        for name in found.artifact.plan.layers
        for key, value in found.artifact.quantized(name).state().items()
    }
    assert same(flat, codes_of(workdir))
    ours, theirs = weights_of(folder), weights_of(workdir / "export" / "safetensors")
    assert ours == theirs
    assert written.size_bytes == sum(map(len, ours.values()))
    loaded = compress.load(folder, dtype=torch.float16)
    values = loaded.state_dict()
    assert all(torch.equal(v, values[k]) for k, v in found.model.state_dict().items())


def test_sharded_exports_hold_the_same_tensors(ground: Ground, full: Path) -> None:
    shards = [{"format": "safetensors", "max_shard_size": "50KB"}]
    workdir = ground.run("shards", export=shards, quantize={"scale_dtype": "float16"})
    folder = workdir / "export" / "safetensors"
    assert (folder / "model.safetensors.index.json").is_file()
    assert len(list(folder.glob("*.safetensors"))) > 2
    merged: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        merged |= load_file(path)
    assert same(merged, load_file(full / "export/safetensors/model.safetensors"))


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


@pytest.mark.parametrize(
    "scheme", ["int2-g16", "int8", "int5-g32-asym", "int4-asym", "int3"]
)
def test_grids_of_compressed_tensors(ground: Ground, scheme: str) -> None:
    workdir = ground.run(f"grid-{scheme}", quantize={"scheme": scheme})
    assert report_of(workdir)["layers"][0]["scheme"] == scheme
    loaded = compress.load(workdir / "export" / "safetensors")
    assert bool(torch.isfinite(logits_of(loaded, windows())).all())


@pytest.mark.parametrize("scheme", ["q4_1", "q5_0", "q5_1", "q8_0"])
def test_grids_of_gguf(ground: Ground, scheme: str) -> None:
    workdir = ground.run(f"grid-{scheme}", quantize={"scheme": scheme}, export=[GGUF])
    (path,) = (workdir / "export" / "gguf").iterdir()
    tensor = open_gguf(path).tensors["blk.0.attn_q.weight"]
    assert tensor.type == scheme
    assert report_of(workdir)["exports"]["gguf"]["size_bytes"] == path.stat().st_size


def test_codes_that_a_format_cannot_hold_are_refused_before_any_work(
    ground: Ground,
) -> None:
    from compress.core.errors import PlanError

    with pytest.raises(PlanError, match=r"export\.gguf: model\.layers\.0\.self_attn"):
        ground.run("refused", quantize={"scheme": "int3-g32"}, export=BOTH)
    assert not (ground.folder / "refused").exists()


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


@pytest.mark.parametrize("tied", [False, True])
def test_the_embedding_can_be_in_the_plan(
    ground: Ground, tied: bool, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "m", dtype=torch.float16, tie_word_embeddings=tied)
    named = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    overrides = {n: {"scheme": "q5_1", "method": "rtn"} for n in named}
    workdir = compress.run(
        config_of(
            tmp_path / "m",
            ground.text,
            tmp_path / "w",
            quantize={"overrides": overrides},
            export=[{"format": "gguf"}],
        )
    ).workdir
    (path,) = (workdir / "export" / "gguf").iterdir()
    tensors = open_gguf(path).tensors
    assert tensors["token_embd.weight"].type == "q5_1"
    assert ("output.weight" in tensors) != tied
    rows = [x for x in report_of(workdir)["layers"] if x["block"] is None]
    assert [row["name"] for row in rows] == named


def test_a_gguf_file_is_a_source(full: Path, ground: Ground) -> None:
    (gguf,) = (full / "export" / "gguf").glob("*.gguf")
    workdir = ground.run(
        "from-gguf", model={"path": str(gguf)}, quantize={"scheme": "q4_0"}, export=BOTH
    )
    report = report_of(workdir)
    assert report["model"]["dtype"] == "float16"
    assert any("source is a GGUF file" in line for line in report["warnings"])
    assert (workdir / "export/safetensors/tokenizer.json").is_file()


def test_without_quantize_a_model_is_only_converted(ground: Ground) -> None:
    workdir = ground.run("convert", quantize=None, evaluate=None, export=BOTH)
    exported = load_file(workdir / "export/safetensors/model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for path in ground.model.glob("*.safetensors"):
        stored |= load_file(path)
    assert same(exported, stored)


def test_without_evaluation_and_export_there_is_still_a_report(
    ground: Ground,
) -> None:
    report = report_of(ground.run("bare", evaluate=None, export=[]))
    assert report["exports"] == {}
    assert report["metrics"] == {"base": None, "compressed": None}


def test_another_format_can_be_written_later(ground: Ground, full: Path) -> None:
    ground.run(
        "later", quantize={"scale_dtype": "float16"}, export=[{"format": "safetensors"}]
    )
    workdir = ground.folder / "later"
    blocks = digests(workdir / "blocks")
    first = weights_of(workdir / "export" / "safetensors")
    result = call("export", workdir, "--to", "gguf", "--set", "embedding=f16")
    assert result.exit_code == 0, result.output
    assert digests(workdir / "blocks") == blocks
    assert weights_of(workdir / "export" / "safetensors") == first
    assert set(report_of(workdir)["exports"]) == {"safetensors", "gguf"}
    (ours,) = (workdir / "export" / "gguf").iterdir()
    (theirs,) = (full / "export" / "gguf").iterdir()
    assert ours.read_bytes() == theirs.read_bytes()


def test_export_without_a_run_is_refused(tmp_path: Path) -> None:
    result = call("export", tmp_path, "--to", "gguf")
    assert result.exit_code == 2
    assert "no finished run here" in result.output


def test_quantize_replaces_weights_in_place(ground: Ground) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ground.model)
    before = model.lm_head.weight.detach().clone()
    found = compress.quantize(
        model,
        "int4-g32",
        method="rtn",
        overrides={"model.layers.0.mlp.up_proj": {"scheme": "dense"}},
    )
    assert found.model is model
    for name in found.artifact.plan.layers:
        values = found.artifact.quantized(name).dequantize(torch.float16)
        assert torch.equal(model.get_submodule(name).weight, values)
    assert torch.equal(model.lm_head.weight, before)
    assert len(found.artifact.plan.layers) == 13
    assert found.records["model.layers.0.mlp.down_proj"]["weight_error"] > 0


def test_save_refuses_a_folder_that_is_in_use(ground: Ground) -> None:
    from transformers import AutoModelForCausalLM

    from compress.core.errors import ConfigError

    model = AutoModelForCausalLM.from_pretrained(ground.model)
    found = compress.quantize(model, "int8", method="rtn")
    with pytest.raises(ConfigError, match="is not empty"):
        found.save(ground.model)


def test_gptq_in_memory_needs_tokens(ground: Ground) -> None:
    from transformers import AutoModelForCausalLM

    from compress.core.errors import CalibrationError

    model = AutoModelForCausalLM.from_pretrained(ground.model)
    with pytest.raises(CalibrationError, match="pass calibration="):
        compress.quantize(model, "int4-g32")
