"""Whole runs of a model whose blocks differ in width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_fixtures import ROWS, save_tokenizer
from pipeline_fixtures import BOTH, Ground, logits_of, report_of, windows
from shapes_fixtures import save_uneven

import compress
from compress.core.errors import PlanError
from compress.core.shapes import MODELING_FILE
from compress.export.gguf_files import only_file
from compress.export.gguf_reader import open_gguf
from compress.model.loading import open_model

# Rows as long as K types need them, but for the second block's down matrix.
WIDTHS = (512, 288, 256)
SIZES: dict[str, Any] = {
    "widths": WIDTHS,
    "hidden_size": 256,
    "head_dim": 64,
    "vocab_size": ROWS,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.05,
}


@pytest.fixture(scope="module")
def uneven(ground: Ground) -> Ground:
    folder = ground.folder / "uneven"
    save_uneven(folder, "llama", **SIZES)
    save_tokenizer(folder)
    return Ground(ground.folder, folder, ground.text)


def test_both_files_hold_the_codes(uneven: Ground, llama_cpp: None) -> None:
    workdir = uneven.run("uneven-both", export=BOTH, run={"verify": True})
    report = report_of(workdir)
    for entry in report["exports"].values():
        assert entry["verify"]["passed"] and entry["codes"]["identical"]
    folder = workdir / "export" / "safetensors"
    assert (folder / MODELING_FILE).is_file()
    again = open_model(str(folder), cache=workdir / "opened")
    ids = windows()
    file = open_model(str(only_file(workdir / "export/gguf")), cache=workdir / "gguf")
    assert file.description.config["intermediate_size_per_layer"] == list(WIDTHS)
    for name in again.description.tensors:
        ours, theirs = again.source.read(name), file.source.read(name)
        torch.testing.assert_close(ours.half(), theirs.half(), atol=0, rtol=0)
    assert bool(torch.isfinite(logits_of(compress.load(folder), ids)).all())


def test_k_types_fall_back_by_the_width_of_each_block(
    uneven: Ground, llama_cpp: None
) -> None:
    export = [{"format": "gguf", "embedding": "q8_0"}]
    quantize = {"method": "rtn", "scheme": "q4_k"}
    settings = {"verify": True}
    workdir = uneven.run("uneven-k", quantize=quantize, export=export, run=settings)
    entry = report_of(workdir)["exports"]["gguf"]
    assert entry["verify"]["passed"]
    path = only_file(workdir / "export/gguf")
    assert entry["size_bytes"] == path.stat().st_size
    tensors = open_gguf(path).tensors
    types = [tensors[f"blk.{index}.ffn_down.weight"].type for index in range(3)]
    assert types == ["q4_k", "q5_0", "q4_k"]
    assert tensors["blk.1.ffn_up.weight"].type == "q4_k"


def test_a_budget_is_met_to_the_byte(uneven: Ground) -> None:
    run = uneven.run(
        "uneven-budget",
        quantize={"method": "rtn", "scheme": None},
        budget={"bits_per_weight": 7.0},
        allocate={"method": "ilp", "samples": 2, "windows": 2},
        export=[{"format": "gguf"}],
    )
    found = report_of(run)["allocation"]
    size = only_file(run / "export/gguf").stat().st_size
    assert size == found["file_bytes"] <= found["budget_bytes"]


def test_a_transformed_model_keeps_its_widths(uneven: Ground) -> None:
    workdir = uneven.run(
        "uneven-transforms",
        transforms=["rotation", "awq"],
        export=[{"format": "safetensors"}],
        run={"verify": True},
    )
    assert report_of(workdir)["exports"]["safetensors"]["verify"]["passed"]


def test_a_family_without_deci_is_refused_before_work(
    uneven: Ground, tmp_path: Path
) -> None:
    save_uneven(tmp_path / "model", "qwen3", vocab_size=ROWS)
    save_tokenizer(tmp_path / "model")
    with pytest.raises(PlanError, match="`shape: uniform` or `shape: padded`"):
        uneven.run("uneven-qwen3", model={"path": str(tmp_path / "model")}, export=BOTH)
    assert not (uneven.folder / "uneven-qwen3").exists()
