"""Calibration tokens on disk: found again, never mistaken, and no trouble when lost."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizer_fixtures import byte_tokenizer

from compress.calibration import data
from compress.calibration.cache import cache_folder
from compress.calibration.data import CalibrationTokens, load_tokens


class Desk:
    """A text, a cache of its own, and a count of the times a text was tokenized."""

    def __init__(self, folder: Path) -> None:
        self.text = folder / "text.txt"
        self.text.write_text("".join(f"{index:08d}" for index in range(40)))
        self.cache = folder / "cache"
        self.tokenized = 0

    def load(self, spec: Any = None, **changes: Any) -> CalibrationTokens:
        options = {"samples": 4, "sequence_length": 8, "seed": 0} | changes
        tokenizer = options.pop("tokenizer", None) or byte_tokenizer()
        return load_tokens(spec or str(self.text), tokenizer, **options)

    def entries(self) -> list[Path]:
        return sorted((self.cache / "calibration").iterdir())


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    made, tokenize = Desk(tmp_path), data._tokenize

    def counting(text: str, tokenizer: Any) -> torch.Tensor:
        made.tokenized += 1
        return tokenize(text, tokenizer)

    monkeypatch.setattr(data, "_tokenize", counting)
    monkeypatch.setenv("COMPRESS_CACHE", str(made.cache))
    yield made


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_the_second_call_does_not_tokenize(desk: Desk) -> None:
    first, second = desk.load(), desk.load()
    assert desk.tokenized == 1
    assert torch.equal(first.tokens, second.tokens)
    assert (first.digest, first.sources) == (second.digest, second.sources)
    assert len(desk.entries()) == 1


def test_an_entry_is_found_after_the_tokenizer_has_truncated(desk: Desk) -> None:
    tokenizer = byte_tokenizer()
    desk.load(tokenizer=tokenizer)
    tokenizer("some words", truncation=True, max_length=3)
    desk.load(tokenizer=tokenizer)
    assert desk.tokenized == 1


def test_the_same_text_under_another_name_is_found(desk: Desk, tmp_path: Path) -> None:
    desk.load()
    copy = tmp_path / "copy.txt"
    copy.write_bytes(desk.text.read_bytes())
    assert desk.load(str(copy)).sources == ((str(copy), 4),)
    assert desk.tokenized == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"samples": 5},
        {"sequence_length": 9},
        {"tokenizer": byte_tokenizer(bos=True)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_parameter_is_another_entry(
    desk: Desk, changes: dict[str, Any]
) -> None:
    desk.load()
    found = desk.load(**changes)
    assert (desk.tokenized, len(desk.entries())) == (2, 2)
    desk.cache.rename(desk.cache.with_name("moved"))
    assert torch.equal(found.tokens, desk.load(**changes).tokens)


def test_changed_text_is_another_entry(desk: Desk) -> None:
    before = desk.load()
    desk.text.write_text(desk.text.read_text() + "x")
    assert desk.load().digest != before.digest
    assert (desk.tokenized, len(desk.entries())) == (2, 2)


def test_weights_make_another_entry(desk: Desk) -> None:
    def spec(weight: float) -> list[dict[str, Any]]:
        entries = [{"source": str(desk.text), "weight": weight}, {"source": "mix/code"}]
        return entries

    assert desk.load(spec(1)).sources[0][1] == 2
    assert desk.load(spec(3)).sources[0][1] == 3
    assert len(desk.entries()) == 2


def test_a_dataset_is_read_again_but_not_tokenized(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": "x" * 100}]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: iter(rows))
    desk.load("hf:org/name")
    desk.load("hf:org/name")
    assert desk.tokenized == 1
    rows[0]["text"] = "y" * 100
    desk.load("hf:org/name")
    assert desk.tokenized == 2


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_tokens(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)


def other_shape(path: Path) -> None:
    save_file({"tokens": load_file(path)["tokens"][:3]}, path)


def other_tensor(path: Path) -> None:
    save_file({"ids": load_file(path)["tokens"]}, path)


def no_header(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize(
    "damage", [cut, empty, other_tokens, other_shape, other_tensor, no_header]
)
def test_a_damaged_entry_is_computed_again(
    desk: Desk, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = desk.load()
    (entry,) = desk.entries()
    damage(entry)
    assert torch.equal(desk.load().tokens, before.tokens)
    (message,) = warnings_of(caplog)
    assert "damaged and computed again" in message
    desk.load()  # from the entry that was written again
    assert desk.tokenized == 2
    assert len(warnings_of(caplog)) == 1


def test_a_folder_that_cannot_be_used_costs_one_warning(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    desk.cache.write_text("a file is in the way")
    assert desk.load().tokens.shape == (4, 8)
    (message,) = warnings_of(caplog)
    assert "set COMPRESS_CACHE" in message


def test_tokens_of_a_tokenizer_in_python_are_not_kept(desk: Desk) -> None:
    class Spelling:
        bos_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(character) for character in text]}

        def __len__(self) -> int:
            return 128

    for _ in range(2):
        desk.load(tokenizer=Spelling())
    assert desk.tokenized == 2
    assert not desk.cache.exists()


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"COMPRESS_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"COMPRESS_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/compress"),
        ({"HOME": "/home/me"}, "/home/me/.cache/compress"),
    ],
)
def test_the_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str
) -> None:
    for name in ("COMPRESS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)
