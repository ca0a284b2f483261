"""Reads the pieces of a SentencePiece ``tokenizer.model`` without the library.

The file is a protocol buffer: field 1 repeats pieces (1 text, 2 float score, 3 type),
field 2 is the trainer (3 kind of model: 2 is BPE), field 3 the normalizer (3 whether a
space is put before the text). The piece types are GGUF's token types.

Source: sentencepiece ``src/sentencepiece_model.proto``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compress.core.errors import ExportError

_BPE = 2


@dataclass(frozen=True)
class Piece:
    """A token: its text, its merge score and its type."""

    text: str
    score: float
    type: int


def read_sentencepiece(path: Path) -> tuple[list[Piece], bool]:
    """Return the pieces in order, and whether a space is put before the text.

    Raises:
        ExportError: The file is damaged, or its model is no BPE.
    """
    pieces: list[Piece] = []
    kind, prefix = 1, True
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                kind = int(dict(_fields(value)).get(3, 1))
            elif number == 3 and isinstance(value, bytes):
                prefix = bool(dict(_fields(value)).get(3, 1))
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise ExportError(f"{path}: damaged SentencePiece model: {error}") from error
    if kind != _BPE or not pieces:
        raise ExportError(
            f"{path}: not a SentencePiece BPE; give `template: FILE.gguf` made by "
            "llama.cpp's converter"
        )
    return pieces, prefix


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    content, score = fields[1], fields.get(2, b"\0\0\0\0")
    if not isinstance(content, bytes) or not isinstance(score, bytes):
        raise ValueError("a piece has the wrong types")
    return Piece(
        content.decode("utf-8"),
        float(struct.unpack("<f", score)[0]),
        int(fields.get(3, 1)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
        if position + length > len(data):
            raise ValueError(f"field {number} runs past the end")
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
