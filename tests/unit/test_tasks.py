"""Question sets in files: what is found, what is refused, and how it is scored."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from task_fixtures import ROWS, write_rows, write_tasks
from tokenizer_fixtures import byte_tokenizer

from compress.core.errors import ConfigError
from compress.evaluation.task_rows import Item
from compress.evaluation.tasks import Task, cut, encoded, load_tasks, scores_of


def test_a_folder_gives_validation_and_test_splits(tmp_path: Path) -> None:
    tasks = load_tasks([str(write_tasks(tmp_path))])
    assert [(t.name, t.metric, len(t.items)) for t in tasks] == [
        ("arc_easy", "acc_norm", 12),
        ("boolq", "acc", 12),
        ("gsm8k", "bits_per_byte", 12),
    ]


def test_parts_of_a_file_are_one_task(tmp_path: Path) -> None:
    for part in (1, 2):
        rows = [{**ROWS["piqa"], "goal": f"Part {part}"}]
        write_rows(tmp_path / f"piqa.validation.part{part}of2.jsonl", rows)
    (task,) = load_tasks([str(tmp_path)])
    assert [item.contexts[0] for item in task.items] == [
        "Question: Part 1\nAnswer:",
        "Question: Part 2\nAnswer:",
    ]


def test_a_limit_takes_evenly_spread_questions(tmp_path: Path) -> None:
    rows = [{"context": f"c{i}", "answer": " a"} for i in range(10)]
    file = write_rows(tmp_path / "mine.jsonl", rows)
    (task,) = load_tasks([str(file)], limit=4)
    assert task.total == 10
    assert [item.contexts[0] for item in task.items] == ["c0", "c2", "c5", "c7"]
    assert len(load_tasks([str(file)], limit=99)[0].items) == 10


def test_mmlu_takes_examples_from_the_dev_file_beside_it(tmp_path: Path) -> None:
    shown = {**ROWS["mmlu"], "question": "What is 3 + 1?", "answer": 3}
    write_rows(tmp_path / "mmlu.dev.jsonl", [shown])
    file = write_rows(tmp_path / "mmlu.validation.jsonl", [ROWS["mmlu"]])
    for source in (tmp_path, file):
        (task,) = load_tasks([str(source)])
        assert "What is 3 + 1?" in task.items[0].contexts[0]


def test_unknown_rows_are_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(tmp_path / "piqa.jsonl", [ROWS["piqa"]])
    write_rows(tmp_path / "ifeval.jsonl", [{"prompt": "Write.", "kwargs": []}])
    assert [task.name for task in load_tasks([str(tmp_path)])] == ["piqa"]
    assert "ifeval.jsonl" in caplog.text and "prompt, kwargs" in caplog.text


def test_the_digest_is_of_what_is_scored(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "own.jsonl", [ROWS["own"]])
    (one,) = load_tasks([str(file)])
    write_rows(file, [{**ROWS["own"], "remark": "changes nothing"}])
    (same,) = load_tasks([str(file)])
    write_rows(file, [{**ROWS["own"], "answer": 0}])
    (other,) = load_tasks([str(file)])
    assert one.digest == same.digest != other.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"context": "c", "answer": " a"}\n{"context": "c"', r"own\.jsonl:2: no JSON"),
        ("[1]\n", r"own\.jsonl:1: not a JSON object"),
        (
            '{"context": "c", "answer": " a"}\n{"context": "d"}\n',
            r"row 2: .* this one lacks answer",
        ),
        (
            '{"context": "c", "choices": [" a"], "answer": 7}\n',
            r"row 1 is no row of own: .* answer 7 of 1 choices",
        ),
        (
            '{"context": "c", "choices": [1, 2], "answer": 1}\n',
            r"row 1 is no row of own: .* no text",
        ),
        ('{"context": ' + "[" * 100_000, r"own\.jsonl:1: no JSON: nested too deeply"),
        ('{"context": "", "answer": " a"}\n', r"row 1: a context or an answer is emp"),
        ("", r"holds no JSONL file of a known form"),
    ],
)
def test_a_row_that_does_not_fit_is_named(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_tasks([str(file)])


@pytest.mark.parametrize(
    ("sources", "only", "message"),
    [
        (["nowhere"], [], "nowhere does not exist"),
        (["hub:nothing"], [], "unknown task 'hub:nothing'; there are hub:arc_easy"),
        (["FOLDER"], ["arc"], "no task arc; there are arc_easy, boolq, gsm8k"),
        (["FOLDER", "FOLDER"], [], "two sources hold task"),
    ],
)
def test_what_is_not_there_is_an_error(
    tmp_path: Path, sources: list[str], only: list[str], message: str
) -> None:
    folder = str(write_tasks(tmp_path))
    given = [folder if source == "FOLDER" else source for source in sources]
    with pytest.raises(ConfigError, match=message):
        load_tasks(given, only=only)


def test_hub_sets_are_fetched_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, part: str | None, *, split: str) -> list[Any]:
        asked.append((path, part, split))
        return [ROWS["mmlu"]]

    fake = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    (task,) = load_tasks(["hub:mmlu"])
    assert task.name == "mmlu"
    assert asked == [("cais/mmlu", "all", "test"), ("cais/mmlu", "all", "dev")]


def test_a_hub_that_does_not_answer_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    fake = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(ConfigError, match="baber/piqa could not be fetched.*no netw"):
        load_tasks(["hub:piqa"])


def task_of(*items: Item, metric: str = "acc_norm") -> Task:
    return Task("t", metric, items, len(items))


def test_answers_start_where_the_context_ends() -> None:
    item = Item(("ab", "abc "), (" x", "yz"), 0)
    ((first, second),) = encoded(task_of(item), byte_tokenizer(), longest=99)
    assert (len(first.ids), first.start) == (4, 2)
    assert (len(second.ids), second.start) == (6, 3)  # the space goes to the answer


def test_a_tokenizer_that_starts_with_bos_keeps_it() -> None:
    item = Item(("ab",), (" x",), 0)
    ((one,),) = encoded(task_of(item), byte_tokenizer(bos=True), longest=99)
    assert (len(one.ids), one.start) == (5, 3)


def test_long_contexts_lose_their_start() -> None:
    one = cut([1, 2, 3, 4, 5, 6, 7], 5, 4)
    assert (one.ids, one.start) == ((3, 4, 5, 6, 7), 3)
    answer_alone = cut([1, 2, 3, 4, 5, 6, 7], 2, 3)
    assert (answer_alone.ids, answer_alone.start) == ((4, 5, 6, 7), 1)


def test_lost_starts_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    item = Item(("abcdefgh", "ab"), (" x", " y"), 0)
    ((first, second),) = encoded(task_of(item), byte_tokenizer(), longest=6)
    assert (len(first.ids), len(second.ids)) == (7, 4)
    assert "t: 1 of 2 contexts are longer than 6 tokens" in caplog.text


def test_scores_by_hand() -> None:
    items = Item(("c",) * 2, (" ab", " abcdefgh"), 1), Item(("c",) * 2, (" é", " b"), 0)
    scores = scores_of(task_of(*items), [[-3.0, -4.0], [-2.0, -1.0]])
    assert scores.acc.tolist() == [0, 0]
    assert scores.acc_norm.tolist() == [1, 0]  # -3 / 2 < -4 / 8; -2 / 1 < -1 / 1
    assert scores.chosen.tolist() == [1, 1]
    assert scores.right.tolist() == [1, 0]
    assert scores.gold_bits.tolist() == pytest.approx(
        [4 / math.log(2), 2 / math.log(2)]
    )
    assert scores.gold_bytes.tolist() == [9, 3]
    plain = scores_of(task_of(*items, metric="acc"), [[-3.0, -4.0], [-2.0, -1.0]])
    assert plain.chosen.tolist() == [0, 1]
    assert plain.right.tolist() == [0, 0]
