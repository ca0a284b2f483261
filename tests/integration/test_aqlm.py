"""A model in sums of table entries, from config to a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pipeline_fixtures import config_of, save_checkpoint, write_text
from safetensors.torch import load_file

import compress
from compress.core.errors import CompressError

SCHEME = "aqlm-2x4g4"
ALLOWED = {"allow_large_tables": True}  # a tiny matrix has no room for tables
DENSE = [{"format": "safetensors", "dense": True}]


def test_a_run_writes_dense_weights_of_few_values(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    text = write_text(tmp_path)
    quantize = {"method": "aqlm", "scheme": SCHEME, "options": ALLOWED}
    config = config_of(
        tmp_path / "model",
        text,
        tmp_path / "work",
        quantize=quantize,
        export=DENSE,
        run={"verify": True},
    )
    report = compress.run(config)
    assert report is not None
    weights: dict[str, Any] = load_file(
        tmp_path / "work/export/safetensors/model.safetensors"
    )
    layer = model.model.layers[0].mlp.up_proj.weight.detach()
    coded = weights["model.layers.0.mlp.up_proj.weight"].float()
    assert coded.shape == layer.shape
    relative = float((coded - layer).square().sum() / layer.square().sum())
    assert 0 < relative < 0.5
    rows = coded / coded.norm(dim=1, keepdim=True)
    assert len(rows.view(-1, 4).unique(dim=0)) < rows.numel() // 4


def test_tables_larger_than_a_matrix_stop_a_run_before_it_starts(
    tmp_path: Path,
) -> None:
    save_checkpoint(tmp_path / "model")
    config = config_of(
        tmp_path / "model",
        write_text(tmp_path),
        tmp_path / "work",
        quantize={"method": "aqlm", "scheme": "aqlm-1x8g8"},
        export=DENSE,
    )
    with pytest.raises(CompressError, match="allow_large_tables"):
        compress.run(config)
