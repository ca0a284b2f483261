"""Where calibration text comes from: bundled texts, files, and datasets.

A source is a word: ``mix`` (the bundled blend), ``mix/prose`` (a part of it), a path
that ends in ``.txt`` (or ``.raw``) or ``.jsonl``, or ``hf:NAME[:CONFIG][:SPLIT]``. A
config gives one word or a list of them with weights. Everything that can be wrong with
a source, except what a download brings, is found by :func:`check_sources` before a
model is loaded.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from compress.core.errors import CalibrationError
from compress.core.foreign import parse_json
from compress.data import MIX, read_text

logger = logging.getLogger(__name__)

MIX_NAMES = tuple(f"mix/{part}" for part in MIX)
DOCUMENT_BREAK = "\n\n"
_TEXT_SUFFIXES = (".txt", ".raw")


@dataclass(frozen=True)
class WeightedSource:
    """A source and its share of the windows, relative to the other weights."""

    source: str
    weight: float = 1.0


class SourceLike(Protocol):
    """Anything with a ``source`` and a ``weight``, such as an entry of the config."""

    @property
    def source(self) -> str:
        """Word that names the text."""

    @property
    def weight(self) -> float:
        """Relative share of the windows."""


SourceSpec: TypeAlias = str | Sequence[SourceLike | Mapping[str, Any]]


def parse_sources(spec: SourceSpec) -> tuple[WeightedSource, ...]:
    """Return the sources that a config names, with ``mix`` spelled out by its parts.

    Args:
        spec: One word, or entries with ``source`` and, if not 1, ``weight``.

    Raises:
        CalibrationError: No source, an entry without ``source``, an unknown word, or a
            weight that is not a positive number.
    """
    entries = [WeightedSource(spec)] if isinstance(spec, str) else map(_entry, spec)
    sources: list[WeightedSource] = []
    for entry in entries:
        if not 0 < entry.weight < float("inf"):
            raise CalibrationError(
                f"weight {entry.weight} of calibration source {entry.source!r}; "
                "give a positive number"
            )
        _check_word(entry.source)
        if entry.source == "mix":
            share = entry.weight / sum(MIX.values())
            sources += [
                WeightedSource(f"mix/{part}", share * weight)
                for part, weight in MIX.items()
            ]
        else:
            sources.append(entry)
    if not sources:
        raise CalibrationError("no calibration source is given; use mix, or name one")
    return tuple(sources)


def check_sources(spec: SourceSpec) -> None:
    """Raise unless every source exists and every file reads as text of its kind.

    Files are read to their end, so that a bad line of a ``.jsonl`` is found before a
    model is loaded. Datasets are not downloaded.

    Raises:
        CalibrationError: A source is unknown, missing, empty or malformed; the message
            names file and line.
    """
    for entry in parse_sources(spec):
        if entry.source.endswith(".jsonl"):
            rows = _json_rows(Path(entry.source))
            _require_text(entry.source, "".join(_words(row) for _, row in rows))
        elif entry.source.endswith(_TEXT_SUFFIXES):
            _require_text(entry.source, _read_file(Path(entry.source)))


def load_text(source: str, tokenizer: Any, *, characters: int) -> str:
    """Return the text of one source; documents are separated by an empty line.

    Args:
        source: A word that :func:`parse_sources` returned.
        tokenizer: Renders chat messages with its chat template.
        characters: How much to take from a dataset, which may be huge; bundled texts
            and files are taken whole.

    Raises:
        CalibrationError: The source is missing, empty, malformed or out of reach, or
            has chat messages and the tokenizer has no chat template.
    """
    if source.startswith("mix/"):
        return _bundled(source, tokenizer)
    if source.startswith("hf:"):
        text = _dataset(source, tokenizer, characters)
    elif source.endswith(".jsonl"):
        rows = _json_rows(Path(source))
        text = DOCUMENT_BREAK.join(
            _document(row, tokenizer, where) for where, row in rows
        )
    else:
        text = _read_file(Path(source))
    return _require_text(source, text)


def _entry(entry: SourceLike | Mapping[str, Any]) -> WeightedSource:
    if not isinstance(entry, Mapping):
        return WeightedSource(str(entry.source), float(entry.weight))
    unknown = set(entry) - {"source", "weight"}
    if "source" not in entry or unknown:
        raise CalibrationError(
            f"calibration entry {dict(entry)!r}; each entry is "
            "{source: NAME, weight: NUMBER}"
        )
    try:
        return WeightedSource(str(entry["source"]), float(entry.get("weight", 1)))
    except (TypeError, ValueError) as error:
        raise CalibrationError(
            f"weight {entry['weight']!r} of calibration source {entry['source']!r} "
            "is not a number"
        ) from error


def _check_word(source: str) -> None:
    if source == "mix" or source in MIX_NAMES:
        return
    if source.startswith("hf:"):
        if not 2 <= len(source.split(":")) <= 4 or not source.split(":")[1]:
            raise CalibrationError(
                f"calibration source {source!r}; write hf:NAME, hf:NAME:SPLIT or "
                "hf:NAME:CONFIG:SPLIT"
            )
        return
    if source.endswith((".jsonl", *_TEXT_SUFFIXES)):
        if not Path(source).is_file():
            raise CalibrationError(
                f"calibration file {source} does not exist; give the path of a .txt or "
                ".jsonl file, or use the bundled text: mix"
            )
        return
    names = ("mix", *MIX_NAMES)
    near = difflib.get_close_matches(source, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise CalibrationError(
        f"unknown calibration source {source!r}; {hint}Sources are "
        f"{', '.join(names)}, a .txt or .jsonl file, and hf:NAME"
    )


def _require_text(source: str, text: str) -> str:
    if not text.strip():
        raise CalibrationError(
            f"calibration source {source} holds no text; give a text with at least "
            "samples x sequence_length tokens, or use the bundled text: mix"
        )
    return text


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: byte {error.start} is not UTF-8; convert the file, for example "
            "with: iconv -t UTF-8"
        ) from error
    except OSError as error:
        raise CalibrationError(
            f"calibration file {path} cannot be read: {error.strerror}; "
            "check the path and its permissions"
        ) from error


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield ``file:line`` and the checked row for each line that is not blank."""
    for number, line in enumerate(_read_file(path).split("\n"), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(
                f"{where}:{error.colno}: not JSON: {error.msg}; "
                "a .jsonl file has one object a line"
            ) from error
        yield where, _check_row(row, where)


def _check_row(row: Any, where: str) -> Mapping[str, Any]:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row
    messages = row.get("messages") if isinstance(row, dict) else None
    if (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in messages
        )
    ):
        return row  # type: ignore[no-any-return]
    found = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
    raise CalibrationError(
        f"{where}: found {found or 'an empty object'}; each line needs "
        '{"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'
    )


def _words(row: Mapping[str, Any]) -> str:
    if isinstance(row.get("text"), str):
        return str(row["text"])
    return "".join(message["content"] for message in row["messages"])


def _document(row: Mapping[str, Any], tokenizer: Any, where: str) -> str:
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{where}: has chat messages, and this model's tokenizer has no chat "
            'template; write the rows as {"text": "..."}'
        )
    return _render_chat(row, tokenizer, where)


def _render_chat(row: Mapping[str, Any], tokenizer: Any, where: str) -> str:
    try:
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    except Exception as error:  # templates are programs of strangers
        raise CalibrationError(
            f"{where}: the model's chat template refuses these messages: {error}; "
            "most templates want user and assistant in turn"
        ) from error


def _bundled(source: str, tokenizer: Any) -> str:
    """Return a bundled part; its chats are plain text where there is no template."""
    part = source.removeprefix("mix/")
    text = read_text(f"mix_{part}")
    if part != "chat":
        return text
    rows = [parse_json(line) for line in text.splitlines()]
    if getattr(tokenizer, "chat_template", None):
        return DOCUMENT_BREAK.join(_render_chat(row, tokenizer, source) for row in rows)
    logger.info("the tokenizer has no chat template: mix/chat is read as plain text")
    return DOCUMENT_BREAK.join(
        "\n".join(message["content"] for message in row["messages"]) for row in rows
    )


def _dataset(source: str, tokenizer: Any, characters: int) -> str:
    """Read rows of a dataset, in their order, until there are enough characters."""
    import datasets

    _, name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) == 2 else None
    documents: list[str] = []
    taken = 0
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, row in enumerate(rows):
            where = f"{source} row {number}"
            documents.append(_document(_check_row(row, where), tokenizer, where))
            taken += len(documents[-1])
            if taken >= characters:
                break
    except CalibrationError:
        raise
    except Exception as error:  # the library raises whatever its transport raises
        raise CalibrationError(
            f"calibration source {source} cannot be read: "
            f"{type(error).__name__}: {error}; check the name, the split ({split}) and "
            "the network, or use the bundled text: mix"
        ) from error
    return DOCUMENT_BREAK.join(documents)
