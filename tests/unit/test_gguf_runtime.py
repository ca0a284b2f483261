"""llama.cpp in a process of its own: however that ends, this one goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compress.core.errors import ExportError, MissingDependencyError
from compress.export.gguf_runtime import (
    decoded_logits,
    llamacpp_logits,
    llamacpp_tokens,
)

WINDOWS = torch.zeros(2, 4, dtype=torch.int64)


def kill_with(name: str) -> str:
    return f"import os, signal\nos.kill(os.getpid(), signal.{name})\n"


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Let child processes find a ``llama_cpp`` of ours."""
    (folder / "llama_cpp.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            kill_with("SIGSEGV"),
            r"m\.gguf: .* crashed \(SIGSEGV\); .* llama-cli",
        ),
        (kill_with("SIGKILL"), r"m\.gguf: .* killed \(SIGKILL\), .* want of memory"),
        (
            "import os\nos.write(2, b'GGML_ASSERT(x) failed\\n')\nos.abort()\n",
            r"crashed \(SIGABRT\) \(GGML_ASSERT\(x\) failed\)",
        ),
        ("raise OSError('no libllama.so')", r"status 1 \(OSError: no libllama\.so\)"),
    ],
    ids=["segmentation fault", "killed", "aborted", "not importable"],
)
def test_a_dead_child_is_an_export_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    pretend(monkeypatch, tmp_path, code)
    for run in (llamacpp_logits, decoded_logits):
        with pytest.raises(ExportError, match=message):
            next(run(tmp_path / "m.gguf", WINDOWS))
    with pytest.raises(ExportError, match=message):
        llamacpp_tokens(tmp_path / "m.gguf", "some words")
    assert [path.name for path in tmp_path.iterdir()] == ["llama_cpp.py"]


def test_without_llama_cpp_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingDependencyError, match=r"compress-llm\[verify\]"):
        next(llamacpp_logits(tmp_path / "m.gguf", WINDOWS))


def test_the_child_starts_without_torch() -> None:
    code = "import sys, compress.export.gguf_llama; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"
