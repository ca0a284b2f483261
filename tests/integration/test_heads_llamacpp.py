"""GGUF files of models that lost key-value groups, in llama.cpp itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from heads_fixtures import prune, save_heads, stock
from pipeline_fixtures import GGUF, config_of, logits_of, report_of, write_text

import compress
from compress.core.artifact import CompressedModel
from compress.core.plan import Plan
from compress.export.gguf import GGUFExporter, GGUFOptions
from compress.export.gguf_reader import open_gguf
from compress.export.gguf_runtime import llamacpp_logits
from compress.model.loading import open_model

pytest.importorskip("llama_cpp")

TOKENS = torch.randint(3, 400, (2, 64), generator=torch.Generator().manual_seed(0))
PLAIN = GGUFExporter(GGUFOptions(embedding="f32"))


@pytest.mark.parametrize(
    ("kind", "groups", "architecture"),
    [
        ("llama", 2, "llama"),
        ("mistral", 1, "llama"),
        ("qwen3", 3, "qwen3"),
        # Its graph takes no heads that are narrower together than the model.
        ("qwen2", 3, "deci"),
    ],
)
def test_llamacpp_computes_what_torch_computes(
    kind: str, groups: int, architecture: str, tmp_path: Path
) -> None:
    window = {"sliding_window": None} if kind == "mistral" else {}
    save_heads(tmp_path / "model", kind, tokenizer=True, **window)
    prune(tmp_path / "model", tmp_path, kv_groups=groups)
    handle = open_model(str(tmp_path / "pruned"), cache=tmp_path / "cache")
    described, plan = handle.description, Plan("tiny", {})
    assert PLAIN.check(plan, described) == []
    artifact = CompressedModel(described, plan, handle.source, no_codes)
    (path,) = PLAIN.write(artifact, tmp_path).files
    assert open_gguf(path).architecture == architecture
    expected = logits_of(stock(tmp_path / "pruned", dtype=torch.float32), TOKENS)
    found = torch.stack(list(llamacpp_logits(path, TOKENS)))
    assert float(expected.abs().max()) > 1
    assert float((found - expected).abs().max()) < 1e-3


def no_codes(layer: str) -> Any:
    raise KeyError(layer)


def test_a_run_prunes_heads_quantizes_and_says_so(tmp_path: Path) -> None:
    save_heads(tmp_path / "model", tokenizer=True)
    section = {"method": "maw", "kv_groups": 2}
    config = config_of(
        tmp_path / "model",
        write_text(tmp_path),
        tmp_path / "run",
        prune=section,
        quantize={"method": "rtn", "scheme": "q8_0"},
        export=[GGUF],
        run={"verify": True},
    )
    report = report_of(compress.run(config).workdir)
    assert report["pruning"]["kv_groups"] == {"before": 4, "after": 2, "by": "weights"}
    assert any("heads" in warning for warning in report["warnings"])
    shapes = {row["role"]: row["shape"] for row in report["layers"]}
    assert (shapes["q"], shapes["k"], shapes["o"]) == ([64, 64], [32, 64], [64, 64])
    assert report["exports"]["gguf"]["verify"]["passed"]
    assert report["exports"]["gguf"]["codes"]["identical"]
