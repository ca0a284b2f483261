"""``compress compare`` on tiny checkpoints: figures, resuming, refusals."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import Ground, call, save_checkpoint, write_text
from task_fixtures import ROWS, write_rows, write_tasks
from transformers import AutoTokenizer

import compress
from compress import comparing
from compress.core.continuations import Continuation
from compress.core.errors import (
    CheckpointError,
    CompressError,
    ConfigError,
    MissingDependencyError,
)
from compress.export.gguf_runtime import (
    llamacpp_generate,
    llamacpp_logits,
    llamacpp_scores,
)
from compress.subject import Subject


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    """Return a checkpoint, and runs that made INT4 and GGUF files of it."""
    folder = tmp_path_factory.mktemp("ground")
    save_checkpoint(folder / "model")
    found = Ground(folder, folder / "model", write_text(folder))
    write_tasks(folder / "tasks")
    exports = [{"format": "safetensors"}, {"format": "gguf", "embedding": "f16"}]
    found.run("int4", evaluate=None, export=exports)
    return found


def gguf_of(ground: Ground) -> Path:
    (file,) = (ground.folder / "int4" / "export" / "gguf").glob("*.gguf")
    return file


def compared(ground: Ground, folder: Path, *candidates: str, **options: Any) -> Any:
    given = {
        "texts": [str(ground.text)],
        "protocols": ["llamacpp512"],
        "tokens": 4096,
        "tasks": [str(ground.folder / "tasks")],
        "folder": folder,
    }
    return comparing.compare(f"base={ground.model}", candidates, **(given | options))


def test_a_comparison_holds_all_figures(ground: Ground, tmp_path: Path) -> None:
    found = compared(
        ground,
        tmp_path,
        f"same={ground.model}",
        f"int4={ground.folder / 'int4'}",
        f"gguf={gguf_of(ground)}",
    )
    data = json.loads((tmp_path / "compare.json").read_text())
    assert data == found.to_dict()
    models = {model["name"]: model for model in data["models"]}
    assert [m["runs_in"] for m in models.values()] == ["torch"] * 3 + ["llama.cpp"]
    assert models["gguf"]["size_bytes"] == gguf_of(ground).stat().st_size
    assert models["base"]["bits_per_weight"] == pytest.approx(32, rel=0.05)
    texts = {row["model"]: row for row in data["texts"]}
    assert texts["base"]["protocol"] == "llamacpp512, first 8 of 23 windows"
    assert texts["same"]["kl"] == 0
    assert texts["same"]["ppl_ratio_interval"]["value"] == 1
    assert texts["same"]["ppl_ratio_interval"]["significant"] is False
    low, high = (texts["int4"]["kl_interval"][end] for end in ("low", "high"))
    assert 0 < low <= texts["int4"]["kl"] <= high
    # The same codes, and llama.cpp's 8-bit activations.
    assert texts["gguf"]["kl"] == pytest.approx(texts["int4"]["kl"], rel=0.2)
    means = {row["model"]: row for row in data["means"]}
    assert means["same"]["flips"] == means["same"]["changed"] == 0
    assert means["base"]["tasks"] == 2 and means["base"]["items"] == 24
    tasks = [(row["task"], row["model"]) for row in data["tasks"]]
    assert tasks[:2] == [("arc_easy", "base"), ("arc_easy", "same")]
    assert len(tasks) == 12
    assert len(data["pairs"]) == 3
    ElementTree.parse(tmp_path / "compare.svg")
    text = found.text()
    assert "Candidates against each other" in text and "gsm8k" in text
    assert "| int4 |" in (tmp_path / "compare.md").read_text()


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that every run of a model adds to."""
    ran: list[str] = []
    score, answer = comparing.score_candidates, Subject.likelihoods

    def score_candidates(texts: Any, base: Any, candidates: Any, **others: Any) -> Any:
        ran.extend(candidates or ["base"])
        return score(texts, base, candidates, **others)

    def likelihoods(self: Subject, groups: Sequence[Sequence[Continuation]]) -> Any:
        ran.append(f"{self.name} task")
        return answer(self, groups)

    monkeypatch.setattr(comparing, "score_candidates", score_candidates)
    monkeypatch.setattr(Subject, "likelihoods", likelihoods)
    return ran


def test_what_was_measured_is_not_measured_again(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = counting(monkeypatch)
    int4, same = f"int4={ground.folder / 'int4'}", f"same={ground.model}"
    first = compared(ground, tmp_path, int4, only=["boolq"]).to_dict()
    assert ran == ["int4", "base task", "int4 task"]
    ran.clear()
    again = compared(ground, tmp_path, int4, only=["boolq"]).to_dict()
    assert ran == []
    assert again["texts"] == first["texts"] and again["tasks"] == first["tasks"]
    compared(ground, tmp_path, int4, same, only=["boolq"])
    assert ran == ["same", "same task"]
    ran.clear()
    compared(ground, tmp_path, int4, only=["boolq"], limit=5)
    assert ran == ["base task", "int4 task"]
    ran.clear()
    compared(ground, tmp_path, int4, only=["boolq"], tokens=2048)
    assert ran == ["int4"]
    ran.clear()
    compared(ground, tmp_path, int4, only=["boolq"], overwrite=True)
    assert ran == ["int4", "base task", "int4 task"]


def test_written_answers_are_compared(ground: Ground, tmp_path: Path) -> None:
    rows = [{**ROWS["ifeval"], "prompt": f"Say hello {i} times."} for i in range(18)]
    options: dict[str, Any] = {
        "texts": [],
        "tasks": [str(write_rows(tmp_path / "ifeval" / "input_data.jsonl", rows))],
        "answer_tokens": 5,
    }
    names = f"same={ground.model}", f"gguf={gguf_of(ground)}"
    found = compared(ground, tmp_path / "out", *names, **options)
    base, same, gguf = found.data["tasks"]
    assert base["task"] == "ifeval" and base["items"] == 18
    assert base["instructions"] == 36 and base["most_tokens"] == 5
    assert same["flips"] == same["changed"] == 0
    assert 0 < gguf["answer_tokens"] <= 5
    assert "Instructions followed" in found.text()

    (file,) = (tmp_path / "out" / "measured").glob("base-*.json")
    parts = json.loads(file.read_text())["parts"].values()
    assert [len(part["data"]["texts"]) for part in parts] == [16, 2]
    model, tokenizer = (
        compress.load(ground.model),
        AutoTokenizer.from_pretrained(ground.model),
    )
    said = [{"role": "user", "content": rows[0]["prompt"]}]
    asked = tokenizer.apply_chat_template(
        said, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(asked, return_tensors="pt", add_special_tokens=False)["input_ids"]
    new = model.generate(ids, max_new_tokens=5, do_sample=False)
    expected = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
    assert next(iter(parts))["data"]["texts"][0] == expected
    again = compared(ground, tmp_path / "out", *names, **options)
    assert again.data["tasks"] == found.data["tasks"]


def test_an_interrupted_comparison_goes_on(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    int4 = f"int4={ground.folder / 'int4'}"
    with monkeypatch.context() as patch:
        patch.setattr(Subject, "likelihoods", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compared(ground, tmp_path, int4, only=["boolq"])
    assert not (tmp_path / "compare.json").exists()
    ran = counting(monkeypatch)
    compared(ground, tmp_path, int4, only=["boolq"])
    assert ran == ["base task", "int4 task"]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_damaged_file_is_measured_again(
    ground: Ground,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    same = f"same={ground.model}"
    compared(ground, tmp_path, same, tasks=[])
    (file,) = (tmp_path / "measured").glob("same-*.json")
    file.write_text(file.read_text()[:50])
    ran = counting(monkeypatch)
    compared(ground, tmp_path, same, tasks=[])
    assert ran == ["same"]
    assert f"{file} is damaged" in caplog.text


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ("nowhere", "nowhere: no such file or folder"),
        ("cut", r"."),
        ("cut.gguf", r"."),
        ("incomplete", "lacks|missing|cannot"),
        ("other", "its vocabulary is not that of"),
    ],
)
def test_an_unreadable_candidate_is_refused_before_anything_runs(
    ground: Ground,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    candidate: str,
    message: str,
) -> None:
    make_bad(ground, tmp_path / candidate)
    ran = counting(monkeypatch)
    with pytest.raises(CompressError, match=message):
        compared(ground, tmp_path / "out", str(tmp_path / candidate))
    assert ran == []
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_without_llamacpp_is_refused_before_anything_runs(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    ran = counting(monkeypatch)
    with pytest.raises(MissingDependencyError, match=r"compress-llm\[verify\]"):
        compared(ground, tmp_path, f"gguf={gguf_of(ground)}")
    assert ran == []


def make_bad(ground: Ground, target: Path) -> None:
    if target.name == "cut.gguf":
        data = gguf_of(ground).read_bytes()
        target.write_bytes(data[: len(data) // 2])
    elif target.name == "other":
        save_checkpoint(target, vocab_size=640)
    elif target.name in ("cut", "incomplete"):
        save_checkpoint(target)
        weights = target / "model.safetensors"
        if target.name == "cut":
            weights.write_bytes(weights.read_bytes()[:-1000])
        else:
            from safetensors.torch import load_file, save_file

            state = load_file(weights)
            state.pop("model.layers.1.mlp.up_proj.weight")
            save_file(state, weights)


def test_a_base_alone_has_figures_of_its_own(ground: Ground, tmp_path: Path) -> None:
    found = compared(ground, tmp_path)
    (text,), (mean,) = found.data["texts"], found.data["means"]
    assert text["perplexity"] > 1 and "kl" not in text
    assert 0 <= mean["accuracy"] <= 1 and "flips" not in mean
    assert "base" in found.text()
    ElementTree.parse(tmp_path / "compare.svg")


def test_two_models_of_one_name_are_refused(ground: Ground, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two models are called 'base'"):
        compared(ground, tmp_path, f"base={ground.model}")


def test_nothing_to_measure_is_an_error(ground: Ground, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to measure"):
        compared(ground, tmp_path, f"same={ground.model}", texts=[], tasks=[])


def test_a_work_directory_without_exports_is_refused(
    ground: Ground, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="without exports yet"):
        compared(ground, tmp_path / "out", str(tmp_path / "run"))


def test_the_command_prints_tables_or_json(ground: Ground, tmp_path: Path) -> None:
    words = ["compare", ground.model, f"int4={ground.folder / 'int4'}"]
    words += ["--text", ground.text, "--protocol", "llamacpp512", "--tokens", "512"]
    words += ["--tasks", ground.folder / "tasks", "--limit", "4", "--to", tmp_path]
    shown = call(*words)
    assert shown.exit_code == 0, shown.output
    assert "Summary" in shown.stdout and str(tmp_path / "compare.svg") in shown.stdout
    data = json.loads(call(*words, "--json").stdout)
    assert [model["name"] for model in data["models"]] == ["model", "int4"]
    assert compress.compare is comparing.compare
    refused = call(*words[:1], ground.model, "nowhere", "--to", tmp_path)
    assert refused.exit_code == 1
    assert "no such file or folder" in refused.stderr


def test_llamacpp_scores_branches_as_it_scores_each_alone(ground: Ground) -> None:
    file = gguf_of(ground)
    group = [
        Continuation((9, 8, 7, 6, *rest), 4)
        for rest in ((5,), (5, 4, 3), (11, 12), (13,))
    ]
    (found,) = llamacpp_scores(file, [group])
    for one, score in zip(group, found, strict=True):
        ids = torch.tensor([one.ids])
        (logits,) = llamacpp_logits(file, ids)
        logp = logits[3:-1].double().log_softmax(-1)
        alone = float(logp.gather(1, ids[0, 4:, None]).sum())
        # Activations are rounded to 8 bits token by token; only sums differ.
        assert score.nats == pytest.approx(alone, abs=0.02)
        assert score.is_greedy == bool((logp.argmax(-1) == ids[0, 4:]).all())


def test_llamacpp_goes_on_greedily(ground: Ground) -> None:
    file = gguf_of(ground)
    prompts = [[9, 8, 7], [20, 21]]
    answers = list(llamacpp_generate(file, prompts, most=5, stops=[]))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == 5
        (logits,) = llamacpp_logits(file, torch.tensor([[*prompt, *answer]]))
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
