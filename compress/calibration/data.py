"""Calibration text to tokens: windows of equal length, spread over each source.

Each source is tokenized once as a whole and cut into windows that do not overlap and
are never padded. The ``k`` windows that a source owes are drawn one from each ``k``-th
part of its text, so that they see all of it. Where a tokenizer puts a
beginning-of-sequence token before a text, every window begins with it, as every prompt
of the model will.

Rows are shuffled, so that any part of them is a fair sample of all sources. What was
drawn once is kept in the user's cache (:mod:`compress.calibration.cache`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.calibration.cache import key_of, read_entry, write_entry
from compress.calibration.sources import (
    SourceSpec,
    WeightedSource,
    check_sources,
    load_text,
    parse_sources,
)
from compress.core.errors import CalibrationError

__all__ = [
    "CalibrationTokens",
    "SourceSpec",
    "WeightedSource",
    "check_sources",
    "load_tokens",
    "parse_sources",
    "share_windows",
]

# A dataset is read until it holds this many characters for each token that is asked
# for: about four times what the windows need, so that they are not its first rows only.
_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class CalibrationTokens:
    """Windows of token ids, and where they came from.

    Attributes:
        tokens: int64 ``[N, T]``; no padding.
        sources: Name and number of windows of each source, in the order given.
        digest: SHA-256 of text, tokenizer, parameters and tokens; equal digests mean
            equal calibration.
    """

    tokens: Tensor
    sources: tuple[tuple[str, int], ...]
    digest: str


def load_tokens(
    spec: SourceSpec,
    tokenizer: Any,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
) -> CalibrationTokens:
    """Return windows of calibration text as token ids.

    Args:
        spec: A source, or a list of sources with weights.
        tokenizer: A transformers tokenizer.
        samples: Number of windows ``N`` over all sources.
        sequence_length: Tokens ``T`` of a window.
        seed: Chooses the windows and the order of rows.

    Raises:
        CalibrationError: A source cannot be used, or is too short for its share; the
            message says how many windows it has and what to change.
    """
    if samples < 1 or sequence_length < 2:
        raise CalibrationError(
            f"calibration of {samples} samples of {sequence_length} tokens; "
            "samples must be at least 1 and sequence_length at least 2"
        )
    sources = parse_sources(spec)
    shares = share_windows([source.weight for source in sources], samples)
    names = [source.source for source in sources]
    owed = [(name, count) for name, count in zip(names, shares, strict=True) if count]
    characters = samples * sequence_length * _CHARACTERS_PER_TOKEN
    texts = [load_text(name, tokenizer, characters=characters) for name, _ in owed]
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    counts = [count for _, count in owed]
    key = key_of(hashes, tokenizer, [counts, samples, sequence_length, seed])
    rows = read_entry(key, (samples, sequence_length)) if key else None
    if rows is None:
        rows = _draw(owed, texts, tokenizer, length=sequence_length, seed=seed)
        if key:
            write_entry(key, rows)
    digest = _digest(
        rows,
        texts=hashes,
        tokenizer=tokenizer,
        parameters=[names, shares, samples, sequence_length, seed],
    )
    return CalibrationTokens(rows, tuple(zip(names, shares, strict=True)), digest)


def _draw(
    owed: Sequence[tuple[str, int]],
    texts: Sequence[str],
    tokenizer: Any,
    *,
    length: int,
    seed: int,
) -> Tensor:
    """Return the windows ``[N, length]`` that each named source owes, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    prefix = _beginning(tokenizer)
    body = length - len(prefix)
    windows: list[Tensor] = []
    for (name, count), text in zip(owed, texts, strict=True):
        ids = _tokenize(text, tokenizer)
        if len(ids) // body < count:
            raise _too_short(name, ids, body, count)
        windows.append(_spread_windows(ids, body, count=count, generator=generator))
    rows = torch.cat(windows)
    rows = torch.cat([prefix.expand(len(rows), -1), rows], dim=1)
    return rows[torch.randperm(len(rows), generator=generator)].contiguous()


def share_windows(weights: Sequence[float], total: int) -> list[int]:
    """Split ``total`` windows in proportion to ``weights``, by largest remainder.

    Ties go to the earlier source. The parts sum to ``total``.
    """
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts


def _tokenize(text: str, tokenizer: Any) -> Tensor:
    """Return int64 ids ``[n]`` without the tokens that a tokenizer adds by itself."""
    # verbose: the length of the whole text is no mistake, it is cut into windows next.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _beginning(tokenizer: Any) -> Tensor:
    """Return the ids ``[0 or 1]`` that the tokenizer puts before a text."""
    first = tokenizer("a")["input_ids"][:1]
    begins = bool(first) and first[0] == tokenizer.bos_token_id
    return torch.tensor(first if begins else [], dtype=torch.int64)


def _spread_windows(
    ids: Tensor, length: int, *, count: int, generator: torch.Generator
) -> Tensor:
    """Draw one window ``[count, length]`` from each of ``count`` parts of the text."""
    available = len(ids) // length
    windows = ids[: available * length].view(available, length)
    chosen = []
    for part in range(count):
        low = part * available // count
        high = (part + 1) * available // count
        chosen.append(int(torch.randint(low, high, (1,), generator=generator)))
    return windows[chosen]


def _too_short(source: str, ids: Tensor, length: int, count: int) -> CalibrationError:
    available = len(ids) // length
    return CalibrationError(
        f"calibration source {source} has {len(ids)} tokens: {available} windows of "
        f"{length}, and {count} are asked for; lower samples or sequence_length, or "
        "give more text"
    )


def _digest(
    tokens: Tensor, *, texts: list[str], tokenizer: Any, parameters: list[Any]
) -> str:
    identity = [type(tokenizer).__name__, len(tokenizer), texts, parameters]
    digest = hashlib.sha256(json.dumps(identity).encode())
    digest.update(tokens.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
