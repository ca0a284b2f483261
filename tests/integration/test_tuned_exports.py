"""Tuned codes go where calibrated ones go: each format holds them bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline_fixtures import config_of, report_of, save_checkpoint, write_text

import compress

OPTIONS = {
    "steps": 40,
    "samples": 48,
    "held_out": 4,
    "sequence_length": 16,
    "batch": 4,
    "evaluations": 4,
    "code_learning_rate": 0.02,
}


@pytest.mark.parametrize(
    ("method", "scheme", "target", "embeddings"),
    [
        ("gptq", "int2-g32", "safetensors", False),
        ("gptq", "int3-g32-asym", "safetensors", False),
        ("gptq", "int4-g32", "gguf", False),
        ("gptq", "iq4_nl", "gguf", False),
        ("gptq", "q2_k", "gguf", False),
        ("gptq", "q3_k", "gguf", False),
        ("gptq", "q2_k", "gguf", True),
        ("kmeans", "palette3-scaled", "palette", False),
    ],
)
def test_an_export_holds_the_tuned_codes(
    method: str, scheme: str, target: str, embeddings: bool, tmp_path: Path
) -> None:
    if target == "safetensors":
        pytest.importorskip("compressed_tensors")
    if target == "gguf":
        pytest.importorskip("llama_cpp")
    save_checkpoint(
        tmp_path / "model",
        hidden_size=256,
        intermediate_size=256,
        initializer_range=0.05,
    )
    overrides = {"re:.*embed_tokens": {"scheme": scheme}} if embeddings else {}
    config = config_of(
        tmp_path / "model",
        write_text(tmp_path),
        tmp_path / "work",
        quantize={"method": method, "scheme": scheme, "overrides": overrides},
        tune={"options": OPTIONS | {"embeddings": embeddings}},
        export=[{"format": target}],
        run={"verify": True},
    )
    compress.run(config)
    report = report_of(tmp_path / "work")
    assert report["tuning"]["kl_after"] < report["tuning"]["kl_before"]
    assert report["tuning"]["changed_codes"] > 0
    entry = report["exports"][target]
    assert entry["codes"] == {"layers": report["tuning"]["layers"], "identical": True}
    assert entry["verify"]["passed"]
