"""``compress bench model`` on GGUF files, in llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_fixtures import compressed, save_tokenizer

from compress.bench import running
from compress.bench.llamacpp import LlamaModel
from compress.bench.model import ModelSettings, bench_model
from compress.bench.page import as_text
from compress.core.errors import (
    CheckpointError,
    ConfigError,
    MissingDependencyError,
)
from compress.export.gguf import GGUFExporter, GGUFOptions
from compress.export.gguf_runtime import llamacpp_logits

pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    save_tokenizer(folder / "assets")
    artifact = compressed("llama", assets=folder / "assets", scheme="q8_0")
    (folder / "out").mkdir()
    GGUFExporter(GGUFOptions()).write(artifact, folder / "out")
    (path,) = (folder / "out").glob("*.gguf")
    return path


def settings(file: Path, **changes: Any) -> ModelSettings:
    numbers: dict[str, Any] = {
        **{"batches": (1, 3), "prefill_tokens": 12, "context_tokens": 5},
        **{"new_tokens": 3, "runs": 2, "warm_up": 1, "idle_seconds": 0.0},
    }
    return ModelSettings(file, **(numbers | changes))


def test_a_file_is_timed_in_llamacpp(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_LEAST_SECONDS", 0.0)
    found = bench_model(settings(file), apart=False)
    (way,) = found["ways"]
    assert way["way"] == "served" and "in llama.cpp" in way["label"]
    assert found["artefact_bytes"] == file.stat().st_size > way["weights_bytes"] > 0
    assert way["prefill"]["tok_s"] > 0 and found["mcr"] is None
    assert [request["batch"] for request in way["requests"]] == [1, 3]
    for request in way["requests"]:
        assert request["it_tok_s"] == request["batch"] / request["itl_s"]["median"]
        assert request["generated_tokens"] % (3 * request["batch"]) == 0
        assert request["kv_bytes"] > 0 and request["amu_gb"] > 0
    text = as_text(found)
    assert "served: " in text and "llama.cpp" in text


def test_each_sequence_goes_on_as_it_would_alone(file: Path) -> None:
    prompts = torch.tensor([[9, 8, 7, 6, 5], [20, 21, 22, 23, 24]])
    generator = LlamaModel(file).generator(prompts, 3)
    for _ in range(2):  # the second time after a rewind
        generator.prefill()
        made = [generator.ids]
        for _ in range(2):
            generator.step()
            made.append(generator.ids)
        generator.rewind()
        assert generator.ids == made[0]
        generator.step()
        assert generator.ids == made[1]
    generator.close()
    for row, prompt in enumerate(prompts.tolist()):
        answer = [ids[row] for ids in made]
        whole = torch.tensor([[*prompt, *answer]])
        (logits,) = llamacpp_logits(file, whole)
        picked = logits[len(prompt) - 1 : -1].gather(1, whole[0, len(prompt) :, None])
        # float16 keys and values there, float32 ones here: no other choice is better.
        assert torch.all(logits[len(prompt) - 1 : -1].amax(1) - picked[:, 0] < 0.05)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"folder": Path("nowhere.gguf")}, CheckpointError, "no such file"),
        ({"ways": ("dense",)}, ConfigError, "as it is served"),
        ({"device": "cuda"}, ConfigError, "CPU|no CUDA"),
    ],
)
def test_what_llamacpp_cannot_be_asked_is_refused(
    file: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    asked = settings(changes.pop("folder", file), **changes)
    with pytest.raises(error, match=message):
        bench_model(asked)


def test_without_llama_cpp_the_extra_is_named(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.bench.model.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"compress-llm\[verify\]"):
        bench_model(settings(file))
