"""Damage to files: bytes, numbers in text, JSON trees, safetensors headers.

Every mutation is a function of a random generator, so that a case is known by its
number.
"""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

_NUMBERS = (0, 1, 2, 7, 8, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63)
_WORDS = (
    b"null",
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"true",
    b"99999999999999999999",
    b'"../../../tmp/escaped"',
    b"[]",
    b"{}",
    b'"\\u0000"',
    b"\xff\xfe",
    b"!!python/object/apply:os.system [x]",
    b"&a *a",
    b"#",
    b"\n\t- ",
    b"{{ 1/0 }}",
)
_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**30,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "../../../tmp/escaped",
    "/tmp/escaped",
    "float32",
    "a" * 5000,
    "\ud800",
    [],
    [None],
    [0, 0],
    [2**40],
    {},
    {"a": 1},
)
_DEEP = 3000


def mutated(data: bytes, generator: random.Random) -> bytes:
    """Return a file with one to three damages."""
    kinds: list[Callable[[bytes, random.Random], bytes]] = [_bytes, _bytes]
    if _is_safetensors(data):
        kinds += [_header] * 4
    elif _is_json(data):
        kinds += [_tree] * 5 + [_text]
    elif not _is_binary(data):
        kinds += [_text, _lines, _lines, _json_lines]
    for _ in range(generator.choice((1, 1, 2, 3))):
        data = generator.choice(kinds)(data, generator)
    return data


def _is_binary(data: bytes) -> bool:
    return b"\0" in data[:4096]


def _is_safetensors(data: bytes) -> bool:
    length = int.from_bytes(data[:8], "little")
    return 8 < len(data) and length <= len(data) - 8 and data[8:9] == b"{"


def _is_json(data: bytes) -> bool:
    if data[:1] not in (b"{", b"["):
        return False
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _place(data: bytes, generator: random.Random) -> int:
    """Return an offset; most of what can go wrong is near the beginning."""
    return int(generator.random() ** generator.choice((1, 2, 4)) * len(data))


def _bytes(data: bytes, generator: random.Random) -> bytes:
    at = _place(data, generator)
    kind = generator.randrange(6)
    if kind == 0:  # one bit
        if not data:
            return b"\0"
        changed = data[at] ^ 1 << generator.randrange(8)
        return data[:at] + bytes([changed]) + data[at + 1 :]
    if kind == 1:  # a number
        code = generator.choice("BHIQ")
        width = struct.calcsize(code)
        number = generator.choice(_NUMBERS) % 256**width
        return data[:at] + struct.pack(f"<{code}", number) + data[at + width :]
    if kind == 2:  # cut
        return data[:at]
    if kind == 3:  # take out
        return data[:at] + data[at + generator.choice((1, 2, 8, 64)) :]
    if kind == 4:  # put in
        return data[:at] + generator.randbytes(generator.choice((1, 4, 8))) + data[at:]
    length = generator.choice((4, 16, 256))  # twice
    return data[: at + length] + data[at:]


def _text(data: bytes, generator: random.Random) -> bytes:
    """Replace a word or number by something else."""
    words = list(re.finditer(rb'[\w.+-]+|"[^"]*"', data))
    if not words:
        return generator.choice(_WORDS)
    word = generator.choice(words)
    return data[: word.start()] + generator.choice(_WORDS) + data[word.end() :]


def _lines(data: bytes, generator: random.Random) -> bytes:
    """Drop, double, indent or swap lines."""
    lines = data.split(b"\n")
    at, other = generator.randrange(len(lines)), generator.randrange(len(lines))
    kind = generator.randrange(4)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(other, lines[at])
    elif kind == 2:
        lines[at] = b"  " + lines[at]
    else:
        lines[at], lines[other] = lines[other], lines[at]
    return b"\n".join(lines)


def _json_lines(data: bytes, generator: random.Random) -> bytes:
    """Damage the tree of a line that is JSON; else a word."""
    lines = data.split(b"\n")
    at = generator.randrange(len(lines))
    if not _is_json(lines[at]):
        return _text(data, generator)
    lines[at] = _tree(lines[at], generator)
    return b"\n".join(lines)


def _tree(data: bytes, generator: random.Random) -> bytes:
    """Replace, drop, double, rename or bury a node of a JSON file."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return _bytes(data, generator)
    if generator.random() < 0.02:
        return b"[" * _DEEP + data + b"]" * _DEEP
    holder = {"root": tree}
    _damage_node(holder, generator)
    return json.dumps(holder.get("root")).encode()


def _header(data: bytes, generator: random.Random) -> bytes:
    """Damage the tree of a safetensors header; its length stays true."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        return _bytes(data, generator)
    header = _tree(data[8 : 8 + length], generator)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _damage_node(holder: Any, generator: random.Random) -> None:
    """Walk down at random, and damage what is found there."""
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = generator.choice(keys)
        below = holder[key]
        stops = not isinstance(below, dict | list) or not below
        if stops or generator.random() < 0.15:
            break
        holder = below
    kind = generator.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[generator.choice(("", "x", "../x", f"{key} ", "__class__"))] = below
        del holder[key]
    elif kind == 2 and isinstance(below, int | float) and below == below:
        holder[key] = below * generator.choice((-1, 2, 1000, 2**40, 0.5))
    elif kind == 3 and isinstance(below, str):
        holder[key] = below[::-1] + generator.choice(("", "/../..", "\n", "{%", "%s"))
    elif kind == 4:
        small = len(str(below)) < 1000
        holder[key] = [below] * generator.choice((2, 3, 1000 if small else 4))
    else:
        holder[key] = generator.choice(_VALUES)
