"""``compress.prune``, of a model in memory and of one on disk, against a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moe_fixtures import save_mixture
from pipeline_fixtures import Ground, weights_of

import compress
from compress.core.errors import CalibrationError, ConfigError

SECTION: dict[str, Any] = {"method": "cfsp", "sparsity": 0.3, "round_to": 16}


def tokens_of(ground: Ground) -> torch.Tensor:
    from transformers import AutoTokenizer

    from compress.calibration.data import load_tokens

    tokenizer = AutoTokenizer.from_pretrained(ground.model)
    return load_tokens(
        str(ground.text), tokenizer, samples=8, sequence_length=32, seed=0
    ).tokens


def test_memory_disk_and_a_run_write_the_same_weights(
    ground: Ground, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    nothing = {"quantize": None, "export": None, "evaluate": None}
    workdir = ground.run("prune-api", prune=SECTION, **nothing)
    model = AutoModelForCausalLM.from_pretrained(ground.model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(ground.model)
    tokens = tokens_of(ground)
    memory = compress.prune(
        model, tmp_path / "a", calibration=tokens, tokenizer=tokenizer, **SECTION
    )
    disk = compress.prune(ground.model, tmp_path / "b", calibration=tokens, **SECTION)
    expected = weights_of(workdir / "pruned")
    assert weights_of(memory.folder) == weights_of(disk.folder) == expected
    assert memory.record["checksum"] == disk.record["checksum"]
    assert memory.record["neurons"] == {"before": 192, "after": 128}
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    loaded = memory.load(dtype=torch.float16)
    stock = AutoModelForCausalLM.from_pretrained(memory.folder)
    for name, parameter in stock.state_dict().items():
        assert torch.equal(parameter, loaded.state_dict()[name])
    again = AutoTokenizer.from_pretrained(memory.folder)
    assert again("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_mixture_in_memory_is_pruned_too(tmp_path: Path) -> None:
    model = save_mixture(tmp_path / "mixture", "qwen3_moe")
    found = compress.prune(model, tmp_path / "out", method="maw", sparsity=1 / 3)
    assert found.load().config.moe_intermediate_size == 64


def test_what_cannot_be_is_said_first(ground: Ground, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ground.model)
    model.config._name_or_path = ""  # its tokenizer would be taken from there
    with pytest.raises(CalibrationError, match="pass calibration="):
        compress.prune(model, tmp_path / "a", **SECTION)
    with pytest.raises(ConfigError, match="unknown pruner 'cfps'.*'cfsp'"):
        compress.prune(model, tmp_path / "a", method="cfps", sparsity=0.3)
    with pytest.raises(ConfigError, match="prune.sparsty: unknown key"):
        compress.prune(model, tmp_path / "a", sparsty=0.3)
    with pytest.raises(ConfigError, match="use per-layer"):
        compress.prune(model, tmp_path / "a", shape="padded", sparsity=0.3, round_to=8)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        compress.prune(model, tmp_path / "full", **SECTION)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
