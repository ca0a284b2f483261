"""Whole runs that remove attention from blocks and go on with what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_fixtures import ROWS
from pipeline_fixtures import (
    BOTH,
    GGUF,
    Ground,
    config_of,
    digests,
    logits_of,
    report_of,
    save_checkpoint,
    windows,
)
from pruning_fixtures import loaded

import compress
from compress.core.errors import PlanError
from compress.core.shapes import ATTENTION
from compress.export.gguf_files import only_file
from compress.model.loading import open_model
from compress.model.sources import read_header

SIZES: dict[str, Any] = {"num_hidden_layers": 4, "vocab_size": ROWS}
PRUNE = {
    "method": "wanda_sp",
    "sparsity": 0.4,
    "depth_unit": "attention",
    "depth_share": 0.6,
    "shape": "per-layer",
    "round_to": 32,
}
NOTHING_ELSE = {"quantize": None, "export": None, "evaluate": None}


@pytest.fixture(scope="module")
def deep(ground: Ground) -> Ground:
    folder = ground.folder / "deep"
    save_checkpoint(folder, "llama", **SIZES)
    return Ground(ground.folder, folder, ground.text)


def test_what_is_left_is_turned_quantized_and_written(
    deep: Ground, llama_cpp: None
) -> None:
    workdir = deep.run(
        "silent-both",
        prune=PRUNE,
        transforms=["rotation", "awq"],
        quantize={"method": "gptq", "scheme": "int4-g32"},
        export=BOTH,
        run={"verify": True},
    )
    report = report_of(workdir)
    gone = report["pruning"]["attention_removed"]
    assert gone and 0 not in gone
    for entry in report["exports"].values():
        assert entry["verify"]["passed"] and entry["codes"]["identical"]
    names = {layer["name"] for layer in report["layers"]}
    for index in range(4):
        has = f"model.layers.{index}.self_attn.q_proj" in names
        assert has == (index not in gone)
        assert f"model.layers.{index}.mlp.down_proj" in names
    ours = open_model(str(workdir / "export/safetensors"), cache=workdir / "opened")
    file = open_model(str(only_file(workdir / "export/gguf")), cache=workdir / "gguf")
    flags = [index not in gone for index in range(4)]
    assert ours.description.config[ATTENTION] == flags
    assert file.description.config[ATTENTION] == flags
    text = (workdir / "report.md").read_text()
    assert f"Blocks without attention: {', '.join(map(str, gone))}." in text


def test_the_cache_of_what_is_left_is_measured(deep: Ground) -> None:
    workdir = deep.run(
        "silent-cache",
        prune=PRUNE,
        kv_cache={"scheme": "fp8", "types": ["f16"], "samples": 4},
        run={"verify": True},
    )
    report = report_of(workdir)
    gone = report["pruning"]["attention_removed"]
    sizes = {e["type"]: e["bytes_per_token"] for e in report["kv_cache"]["types"]}
    config = open_model(str(deep.model), cache=workdir / "dense").description.config
    values = 2 * config["num_key_value_heads"] * config["head_dim"] * (4 - len(gone))
    assert sizes["f16/f16"] == 2 * values
    assert sizes["fp8/fp8"] == values
    (entry,) = report["exports"].values()
    assert entry["verify"]["passed"]
    folder = workdir / "export/safetensors"
    names = [
        name for path in folder.glob("*.safetensors") for name in read_header(path)
    ]
    scales = [f"model.layers.{i}.self_attn.k_scale" for i in range(4) if i not in gone]
    assert sorted(name for name in names if name.endswith("k_scale")) == scales


@pytest.mark.parametrize("train", ["full", "lora"])
def test_what_is_left_is_trained(deep: Ground, train: str) -> None:
    if train == "lora":
        pytest.importorskip("peft")
    options = {
        "train": train,
        "steps": 4,
        "samples": 8,
        "held_out": 4,
        "sequence_length": 32,
        "learning_rate": 1e-3,
    }
    recover = {"method": "distill", "options": options}
    workdir = deep.run(f"silent-{train}", prune=PRUNE, recover=recover, **NOTHING_ELSE)
    report = report_of(workdir)
    assert report["recovery"]["kl_after"] <= report["recovery"]["kl_before"]
    found = open_model(str(workdir / "recovered"), cache=workdir / "opened")
    gone = report["pruning"]["attention_removed"]
    flags = found.description.config[ATTENTION]
    assert [index for index, flag in enumerate(flags) if not flag] == gone
    assert bool(torch.isfinite(logits_of(loaded(workdir), windows())).all())


def test_a_resumed_run_writes_the_same(deep: Ground, tmp_path: Path) -> None:
    def settings(name: str) -> dict[str, Any]:
        return config_of(
            deep.model, deep.text, tmp_path / name, prune=PRUNE, **NOTHING_ELSE
        )

    compress.run(settings("whole"))
    compress.run(settings("broken"))
    folder = tmp_path / "broken/pruned"
    for name in ("model.safetensors.index.json", "model-block-0002.safetensors"):
        (folder / name).unlink()
    compress.run(settings("broken"), resume=True)
    assert digests(folder) == digests(tmp_path / "whole/pruned")


def test_padded_blocks_are_written_for_any_loader(
    deep: Ground, llama_cpp: None
) -> None:
    workdir = deep.run(
        "silent-padded",
        prune=PRUNE | {"shape": "padded"},
        quantize={"method": "rtn", "scheme": "q8_0"},
        export=[GGUF],
        run={"verify": True},
    )
    report = report_of(workdir)
    assert report["pruning"]["attention_removed"]
    assert report["exports"]["gguf"]["verify"]["passed"]
    path = only_file(workdir / "export/gguf")
    assert (
        ATTENTION not in open_model(str(path), cache=workdir / "g").description.config
    )


def test_a_family_that_gguf_cannot_hold_is_refused_before_work(
    ground: Ground, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "qwen3", "qwen3", **SIZES)
    settings = config_of(
        tmp_path / "qwen3",
        ground.text,
        tmp_path / "run",
        prune=PRUNE,
        quantize={"method": "rtn", "scheme": "q8_0"},
        export=[{"format": "gguf"}],
    )
    with pytest.raises(PlanError, match="whether they have attention in llama.cpp"):
        compress.run(settings)
    assert not (tmp_path / "run/pruned").exists()
