"""Runs that code the vocabulary matrix by product quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import config_of, report_of, save_checkpoint, windows, write_text

import compress
from compress.core.errors import CompressError

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
BLOCKS = {r"re:.*layers\.": {"method": "gptq", "scheme": "int4-g32"}}


def config(folder: Path, *, tied: bool, **quantize: Any) -> dict[str, Any]:
    save_checkpoint(folder / "model", tie_word_embeddings=tied)
    ends = [EMBEDDING] if tied else [EMBEDDING, HEAD]
    return config_of(
        folder / "model",
        write_text(folder),
        folder / "run",
        quantize={
            "method": "pq",
            "scheme": "pq-4x4",
            "options": {"allow_large_tables": True},
            "overrides": {**BLOCKS, **{name: {"scheme": "pq-4x4"} for name in ends}},
            **quantize,
        },
        export=[{"format": "palette", "table_logits": True}],
        run={"verify": True},
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_run_mixes_methods_and_its_file_opens(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    workdir = compress.run(config(tmp_path, tied=tied)).workdir
    report = report_of(workdir)
    layers = {layer["name"]: layer for layer in report["layers"]}
    for name in [EMBEDDING] if tied else [EMBEDDING, HEAD]:
        rows, columns = layers[name]["shape"]
        bits = 1 + 16 * 32 / rows  # tables in the type of the checkpoint
        assert layers[name]["bits_per_weight"] == pytest.approx(bits)
        assert 0 < layers[name]["error"] < 1
    assert (HEAD in layers) != tied
    folder = workdir / "export" / "palette"
    ids = windows(2, 16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    dense = compress.load(folder, dtype=torch.float32)
    with torch.inference_mode():
        gap = (model(ids).logits - dense(ids).logits).abs().max()
        assert float(gap) < 1e-4


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        ({"options": {}}, "allow_large_tables"),
        ({"scheme": "palette4", "overrides": {}}, "pq cannot quantize to palette4"),
        ({"overrides": BLOCKS}, "logits are looked up in tables of model.embed_tokens"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(
    quantize: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CompressError, match=message):
        compress.run(config(tmp_path, tied=True, **quantize))
    assert not (tmp_path / "run" / "blocks").exists()
