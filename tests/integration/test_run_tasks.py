"""``evaluate.tasks``: questions for base and compressed model inside of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pipeline_fixtures import config_of, save_checkpoint, write_text
from task_fixtures import ROWS, write_rows, write_tasks

import compress
from compress.core.errors import ConfigError
from compress.subject import Subject


def test_a_run_reports_its_tasks_as_a_comparison_does(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model")
    text = write_text(tmp_path)
    tasks = write_tasks(tmp_path / "tasks")
    write_rows(tasks / "ifeval" / "input_data.jsonl", [ROWS["ifeval"]] * 2)
    asked = {"tasks": [str(tasks)], "task_limit": 9, "answer_tokens": 3}
    config = config_of(
        tmp_path / "model",
        text,
        tmp_path / "run",
        evaluate={"perplexity": [], **asked},
        export=[{"format": "safetensors"}],
    )
    report = compress.run(config).report
    base, own = (report["metrics"][key]["tasks"] for key in ("base", "compressed"))
    assert list(base) == list(own) == ["arc_easy", "boolq", "gsm8k", "ifeval"]
    assert base["arc_easy"]["of"] == 12 and base["arc_easy"]["items"] == 9
    assert "flips" in own["boolq"] and "flips" not in base["boolq"]
    assert own["ifeval"]["most_tokens"] == 3 and own["ifeval"]["instructions"] == 4

    found = compress.compare(
        f"base={tmp_path / 'model'}",
        [f"own={tmp_path / 'run'}"],
        texts=[],
        tasks=asked["tasks"],
        limit=9,
        answer_tokens=3,
        folder=tmp_path / "compared",
    )
    rows = {(row["task"], row["model"]): row for row in found.data["tasks"]}
    for name, figures in own.items():
        expected = rows[name, "own"]
        assert figures.get("accuracy") == expected.get("accuracy")
        if name != "ifeval":
            bits = figures["bits_per_byte"]
            assert bits == pytest.approx(expected["bits_per_byte"], rel=1e-3)
    for kind in ("md", "html"):
        page = (tmp_path / "run" / f"report.{kind}").read_text("utf-8")
        assert "9 of 12" in page and "ifeval, compressed: prompts" in page


def test_answers_are_written_as_the_model_is_served(tmp_path: Path) -> None:
    """With rounded inputs and an FP8 cache, token by token as in one pass."""
    save_checkpoint(tmp_path / "model", head_dim=32)
    text = write_text(tmp_path)
    serving = {
        "quantize": {"method": "rtn", "scheme": "w6a8-g32"},
        "kv_cache": {"scheme": "fp8", "samples": 2},
    }
    config = config_of(
        tmp_path / "model",
        text,
        tmp_path / "run",
        evaluate=None,
        export=[{"format": "safetensors"}],
    )
    compress.run({**config, **serving})
    subject = Subject(str(tmp_path / "run"), name="x", cache=tmp_path / "cache")
    assert subject.rounds_inputs
    prompts = [[9, 8, 7], [20, 21, 22, 23, 24]]
    for prompt, answer in zip(prompts, subject.answers(prompts, most=6), strict=True):
        (logits,) = subject.logits(torch.tensor([[*prompt, *answer]]))
        assert answer == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_tasks_that_are_not_there_are_refused_before_work(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model")
    for source, message in (("nowhere", "does not exist"), ("hub:x", "unknown task")):
        config = config_of(
            tmp_path / "model",
            write_text(tmp_path),
            tmp_path / "run",
            evaluate={"perplexity": [], "tasks": [source]},
        )
        with pytest.raises(ConfigError, match=message):
            compress.plan(config)
    assert not (tmp_path / "run").exists()
