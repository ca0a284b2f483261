"""lm-evaluation-harness on checkpoints of ours: its figures and ours are the same."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from instruction_cases import CASES
from pipeline_fixtures import config_of, save_checkpoint, write_text
from task_fixtures import ROWS, write_rows

from compress.evaluation.likelihood import likelihoods
from compress.evaluation.tasks import encoded, load_tasks, scores_of
from compress.model.loading import open_model
from compress.model.streaming import StreamedModel

lm_eval = pytest.importorskip("lm_eval")

YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{file}"}}}}
output_type: {kind}
validation_split: validation
{rest}
"""
CHOICE = """
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    words = ("north", "south west", "up and away", "in")
    made = [
        {
            **ROWS["arc_easy"],
            "question": f"Which of {i * 7 % 30} ways goes {words[i % 4]}?",
            "choices": {
                "text": [*words[i % 3 :], f"{i} steps"],
                "label": [*"ABCDE"][: 5 - i % 3],
            },
            "answerKey": "AB"[i % 2],
        }
        for i in range(50)
    ]
    return write_rows(folder / "arc_easy.validation.jsonl", made)


def evaluated(task: Path, model: Any) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task.parent), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=[task.stem], task_manager=manager, bootstrap_iters=0
    )
    return dict(found)


def write_task(folder: Path, name: str, kind: str, file: Path, rest: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(YAML.format(name=name, kind=kind, file=file, rest=rest))
    return path


def test_both_score_fifty_questions_alike(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    from compress.lm_eval_adapter import CompressLM

    task = write_task(tmp_path, "ours_arc", "multiple_choice", rows, CHOICE)
    found = evaluated(task, CompressLM(str(model)))["results"]["ours_arc"]

    (own,) = load_tasks([str(rows)])
    handle = open_model(str(model), cache=tmp_path / "cache")
    groups = encoded(own, handle.tokenizer(), longest=256)
    streamed = StreamedModel(handle.description, handle.source)
    nats = [[one.nats for one in group] for group in likelihoods(streamed, groups)]
    scores = scores_of(own, nats)
    assert found["acc,none"] == pytest.approx(float(scores.acc.mean()))
    assert found["acc_norm,none"] == pytest.approx(float(scores.acc_norm.mean()))


def test_the_harness_own_model_gives_the_same_log_likelihoods(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    """Ours against its transformers backend, question by question."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from compress.lm_eval_adapter import CompressLM

    (own,) = load_tasks([str(rows)], limit=6)
    requests = [
        Instance("loglikelihood", {}, (context, answer), index)
        for index, item in enumerate(own.items)
        for context, answer in zip(item.contexts, item.continuations, strict=True)
    ]
    requests.append(Instance("loglikelihood", {}, ("", "a text alone"), 99))
    theirs = HFLM(pretrained=str(model), device="cpu", dtype="float32")
    ours = CompressLM(str(model))
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    assert [nats for nats, _ in found] == pytest.approx(
        [nats for nats, _ in expected], abs=2e-3
    )
    texts = [Instance("loglikelihood_rolling", {}, ("some text " * 60,), 0)]
    (expected_rolling,) = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    (found_rolling,) = ours.loglikelihood_rolling(texts)
    assert found_rolling == pytest.approx(expected_rolling, rel=1e-5)


def test_answers_are_greedy_and_end_where_told(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    from lm_eval.api.instance import Instance

    from compress.core.errors import ConfigError
    from compress.lm_eval_adapter import CompressLM
    from compress.runtime.load import load

    ours = CompressLM(str(model))
    options = {"until": ["\n\n"], "max_gen_toks": 6}
    request = Instance("generate_until", {}, ("Which way?", options), 0)
    (found,) = ours.generate_until([request])

    ids = torch.tensor([ours.tok_encode("Which way?")])
    whole = load(model)
    for _ in range(6):
        token = whole(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, token[None, None]], dim=1)
    expected = ours.tokenizer.decode(ids[0, -6:], skip_special_tokens=True)
    assert found == expected
    stop = expected[2:4]
    options = {"until": stop, "max_gen_toks": 6}
    request = Instance("generate_until", {}, ("Which way?", options), 0)
    assert ours.generate_until([request]) == [expected[: expected.find(stop)]]
    options = {"until": [], "do_sample": True, "temperature": 0.7}
    request = Instance("generate_until", {}, ("Which way?", options), 0)
    with pytest.raises(ConfigError, match="greedy"):
        ours.generate_until([request])


def test_both_judge_answers_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkers of IFEval, but for what a trained tokenizer splits there."""
    for name in ("langdetect", "immutabledict", "nltk"):
        pytest.importorskip(name)
    monkeypatch.setattr("nltk.download", lambda *_, **__: None)
    from lm_eval.tasks.ifeval import utils

    from compress.evaluation.instructions import is_followed, loose_variants

    draw = random.Random(0)
    marks = ("\n", "\n\n", "***", "******", "*", "**", '"', ",", "- ", "[a]", "<<b>>")
    for kind, arguments, *texts in CASES:
        if "sentences" in kind or "capital_word" in kind or "#" in arguments.values():
            continue
        asked = utils.InputExample(0, [kind], "a prompt", [arguments])
        for _ in range(25):
            words = [*texts, *marks, *map(str, arguments.values())]
            text = " ".join(draw.choices(words, k=draw.randint(1, 6)))
            theirs = (
                utils.test_instruction_following_strict(asked, text),
                utils.test_instruction_following_loose(asked, text),
            )
            ours = (
                is_followed(kind, text, arguments),
                any(is_followed(kind, t, arguments) for t in loose_variants(text)),
            )
            found = tuple(bool(one.follow_all_instructions) for one in theirs)
            assert found == ours, (kind, text)


def test_the_command_knows_the_model(model: Path, rows: Path, tmp_path: Path) -> None:
    write_task(tmp_path, "ours_arc", "multiple_choice", rows, CHOICE)
    words = ["--model", "compress", "--model_args", f"pretrained={model}"]
    words += ["--tasks", "ours_arc", "--include_path", str(tmp_path), "--limit", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "compress.lm_eval_adapter", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "acc_norm" in done.stdout


def test_a_gguf_file_is_scored_and_written_with_by_llamacpp(
    model: Path, tmp_path: Path
) -> None:
    from lm_eval.api.instance import Instance

    import compress
    from compress.export.gguf_runtime import llamacpp_generate, llamacpp_logits
    from compress.lm_eval_adapter import CompressLM

    config = config_of(model, write_text(tmp_path), tmp_path / "run", evaluate=None)
    compress.run({**config, "export": [{"format": "gguf", "embedding": "f16"}]})
    (file,) = (tmp_path / "run" / "export" / "gguf").glob("*.gguf")
    ours = CompressLM(str(tmp_path / "run"))

    request = Instance("loglikelihood", {}, ("Which way", " is it"), 0)
    ((found, _),) = ours.loglikelihood([request], disable_tqdm=True)
    ids = torch.tensor([ours.tok_encode("Which way is it")])
    start = len(ours.tok_encode("Which way"))
    (logits,) = llamacpp_logits(file, ids)
    logp = logits[start - 1 : -1].double().log_softmax(-1)
    expected = float(logp.gather(1, ids[0, start:, None]).sum())
    # llama.cpp takes one path or another by the number of tokens.
    assert found == pytest.approx(expected, abs=0.02)

    options = {"until": [], "max_gen_toks": 4}
    request = Instance("generate_until", {}, ("Which way", options), 0)
    (answer,) = ours.generate_until([request])
    prompt = ours.tok_encode("Which way")
    (tokens,) = llamacpp_generate(file, [prompt], most=4, stops=[])
    assert answer == ours.tokenizer.decode(tokens, skip_special_tokens=True)
