"""GGUF files of models whose blocks differ in width, in llama.cpp itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_fixtures import ROWS, same_codes, save_tokenizer
from shapes_fixtures import WIDTHS, uneven_artifact

from compress.core.artifact import CompressedModel
from compress.core.shapes import mlp_widths
from compress.export.gguf import GGUFExporter, GGUFOptions
from compress.export.gguf_reader import open_gguf
from compress.export.gguf_runtime import llamacpp_logits
from compress.model.loading import check_tensors, open_model
from compress.model.padding import padded

pytest.importorskip("llama_cpp")

TOKENS = {"vocab_size": ROWS, "bos_token_id": 0, "eos_token_id": 0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
HEADS = {"num_key_value_heads": 1, "head_dim": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tied": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    # As after heads were pruned: fewer of them, as wide as before.
    "llama fewer heads": ("llama", HEADS | {"num_attention_heads": 2}),
    "qwen2 fewer heads": ("qwen2", HEADS | {"num_attention_heads": 3}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "llama silent": ("llama", {"silent": (1,), "tied": True}),
    "llama all silent but one": ("llama", {"silent": (1, 2), "attention_bias": True}),
    "mistral silent": ("mistral", {"sliding_window": None, "silent": (2,)}),
    "qwen2 silent": ("qwen2", {"silent": (1,)}),
}
WINDOWS = torch.randint(0, ROWS, (2, 64), generator=torch.Generator().manual_seed(0))
PLAIN = GGUFExporter(GGUFOptions(embedding="f32"))


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    save_tokenizer(folder)
    return folder


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(WINDOWS).logits
    return logits


def in_llamacpp(path: Path) -> torch.Tensor:
    return torch.stack(list(llamacpp_logits(path, WINDOWS)))


def largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_llamacpp_computes_what_torch_computes(
    case: str, assets: Path, tmp_path: Path
) -> None:
    kind, changes = CASES[case]
    model, artifact = uneven_artifact(kind, assets=assets, **TOKENS, **changes)
    plan, described = artifact.plan, artifact.description
    assert PLAIN.check(plan, described) == []
    result = PLAIN.write(artifact, tmp_path)
    (path,) = result.files
    assert open_gguf(path).architecture == "deci"
    assert PLAIN.file_bytes(plan, described) == path.stat().st_size
    expected, found = logits_of(model), in_llamacpp(path)
    assert largest(expected) > 1
    assert largest(found - expected) < 1e-3
    described, source = padded(described, artifact.source)
    wide = CompressedModel(described, plan, source, artifact.quantized)
    (tmp_path / "padded").mkdir()
    (other,) = PLAIN.write(wide, tmp_path / "padded").files
    own = "deci" if "qwen2 fewer" in case else described.family.gguf_architecture
    assert open_gguf(other).architecture == own
    assert largest(found - in_llamacpp(other)) < 1e-4


@pytest.mark.parametrize("silent", [(), (1,)])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("scheme", ["q4_0", "q5_1", "q8_0"])
def test_coded_files_hold_the_codes(
    kind: str, scheme: str, silent: tuple[int, ...], assets: Path, tmp_path: Path
) -> None:
    changes = {**TOKENS, "silent": silent}
    model, artifact = uneven_artifact(kind, scheme=scheme, assets=assets, **changes)
    plan, described = artifact.plan, artifact.description
    (path,) = PLAIN.write(artifact, tmp_path).files
    found = torch.stack(list(PLAIN.replay(tmp_path, WINDOWS)))
    assert largest(found - logits_of(model)) < 1e-3
    stored = open_gguf(path).tensors
    promised = PLAIN.tensor_bytes(plan, described)
    assert sum(promised.values()) == sum(t.size_bytes for t in stored.values())
    for layer in plan.layers:
        codes = PLAIN.read_codes(tmp_path, layer)
        assert same_codes(codes, artifact.quantized(layer)), layer


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_read_back(case: str, assets: Path, tmp_path: Path) -> None:
    kind, changes = CASES[case]
    _, artifact = uneven_artifact(kind, assets=assets, **TOKENS, **changes)
    (path,) = PLAIN.write(artifact, tmp_path).files
    handle = open_model(str(path), cache=tmp_path / "cache")
    check_tensors(handle)
    described = handle.description
    assert described.config["model_type"] == ("qwen2" if kind == "qwen2" else "llama")
    assert mlp_widths(described.config) == WIDTHS
    assert set(described.tensors) == set(artifact.description.tensors)
    for name in described.tensors:
        assert torch.equal(handle.source.read(name), artifact.source.read(name)), name
    (again,) = PLAIN.write(
        replace(artifact, description=described, source=handle.source),
        tmp_path / "cache",
    ).files
    left, right = open_gguf(path), open_gguf(again)
    assert left.tensors.keys() == right.tensors.keys()
    assert all((left.read(n) == right.read(n)).all() for n in left.tensors)


def test_blocks_without_attention_need_no_widths(assets: Path, tmp_path: Path) -> None:
    """The list of llama.cpp's heads has a zero, that of its widths is one number."""
    even = {"widths": (96, 96, 96), "silent": (1,)}
    model, artifact = uneven_artifact("llama", assets=assets, **TOKENS, **even)
    (path,) = PLAIN.write(artifact, tmp_path).files
    file = open_gguf(path)
    assert file.architecture_value("attention.head_count") == [4, 0, 4]
    assert file.architecture_value("attention.head_count_kv") == [2, 0, 2]
    assert not any(name.startswith("blk.1.attn") for name in file.tensors)
    assert largest(in_llamacpp(path) - logits_of(model)) < 1e-3
    again = open_model(str(path), cache=tmp_path / "cache").description.config
    assert again["attention_per_layer"] == [True, False, True]
    assert "intermediate_size_per_layer" not in again


@pytest.mark.parametrize("silent", [(), (1,)])
@pytest.mark.parametrize("kind", ["qwen3", "smollm3", "gemma2", "gemma3_text", "phi3"])
def test_families_that_deci_cannot_express_are_refused(
    kind: str, silent: tuple[int, ...], assets: Path
) -> None:
    _, artifact = uneven_artifact(kind, assets=assets, silent=silent)
    (problem,) = PLAIN.check(artifact.plan, artifact.description)
    assert "`shape: uniform` or `shape: padded`" in problem.message
    what = "whether they have attention" if silent else "the width of their MLPs"
    assert what in problem.message
    assert PLAIN.bound_layers(artifact.description) == ()
