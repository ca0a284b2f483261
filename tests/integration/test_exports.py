"""What whole runs write: files that load, hold the codes, and can be written later."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pipeline_fixtures import (
    BOTH,
    GGUF,
    Ground,
    call,
    config_of,
    digests,
    logits_of,
    report_of,
    same,
    save_checkpoint,
    weights_of,
    windows,
)
from safetensors.torch import load_file

import compress
from compress.export.gguf_reader import open_gguf


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
