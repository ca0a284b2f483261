"""Texts to evaluate on: bundled ones by name, and text files by path.

Two forms of a text exist because two protocols want them: ``raw`` is the text as it is
(``llamacpp512``), ``joined`` is what the perplexity of papers is computed on
(``hf2048``). They differ for ``wikitext2`` alone: there every line is a row of a
dataset, rows of white space become empty, and rows are joined by two newlines (GPTQ and
its successors).
"""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path

from compress.core.errors import ConfigError
from compress.data import read_text

BUNDLED: dict[str, str] = {
    "wikitext2": "WikiText-2-raw test, CC BY-SA 3.0",
    "speeches": "three excerpts of State of the Union addresses, public domain",
    "tales": "Alice's Adventures in Wonderland, public domain",
    "code": "ten Python modules of CPython 3.11, PSF-2.0",
}
"""Bundled evaluation texts and what they are; none is part of a calibration text."""

_SUFFIXES = (".txt", ".raw")


@dataclass(frozen=True)
class EvaluationText:
    """A text in the forms that the protocols want.

    Attributes:
        name: Bundled name, or the path that was given.
        raw: The text as it is, line ends included.
        joined: The text for ``hf2048``; equal to ``raw`` except for ``wikitext2``.
        note: What the text is, for the report.
    """

    name: str
    raw: str
    joined: str
    note: str

    @property
    def digest(self) -> str:
        """SHA-256 of the raw text as UTF-8."""
        return hashlib.sha256(self.raw.encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """UTF-8 bytes of the raw text, which bits per byte divide by."""
        return len(self.raw.encode())


def check_evaluation_text(name_or_path: str) -> None:
    """Raise unless the text is bundled or the file exists; reads nothing.

    Raises:
        ConfigError: The message lists the bundled names.
    """
    if name_or_path in BUNDLED:
        return
    names = ", ".join(BUNDLED)
    if not name_or_path.endswith(_SUFFIXES):
        near = difflib.get_close_matches(name_or_path, BUNDLED, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"unknown evaluation text {name_or_path!r}; {hint}"
            f"Texts are {names}, or the path of a .txt file"
        )
    if not Path(name_or_path).is_file():
        raise ConfigError(
            f"evaluation text {name_or_path} does not exist; give the path of a .txt "
            f"file, or a bundled text: {names}"
        )


def evaluation_text(name_or_path: str) -> EvaluationText:
    """Return a text to evaluate on.

    Args:
        name_or_path: A name of :data:`BUNDLED`, or the path of a ``.txt`` or ``.raw``
            file in UTF-8.

    Raises:
        ConfigError: The name is unknown, or the file is missing, empty or not UTF-8.
    """
    check_evaluation_text(name_or_path)
    if name_or_path in BUNDLED:
        raw = read_text(name_or_path)
        joined = join_rows(raw) if name_or_path == "wikitext2" else raw
        return EvaluationText(name_or_path, raw, joined, BUNDLED[name_or_path])
    try:
        raw = Path(name_or_path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"evaluation text {name_or_path}: byte {error.start} is not UTF-8; "
            "convert the file, for example with: iconv -t UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"evaluation text {name_or_path} cannot be read: {error.strerror}; "
            "check its permissions"
        ) from error
    if not raw.strip():
        raise ConfigError(
            f"evaluation text {name_or_path} holds no text; give a text longer than "
            "one window"
        )
    return EvaluationText(name_or_path, raw, raw, f"file {Path(name_or_path).name}")


def join_rows(raw: str) -> str:
    """Return WikiText as papers score it: rows joined by two newlines.

    A row is a line with its newline; a row of white space is the empty string.

    Source: IST-DASLab/gptq, ``datautils.py``, on the rows of ``wikitext-2-raw-v1``,
    whose builder empties blank rows.
    """
    rows = raw.split("\n")
    if not rows[-1]:
        rows.pop()
    return "\n\n".join(row + "\n" if row.strip() else "" for row in rows)
