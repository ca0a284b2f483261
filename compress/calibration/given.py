"""Calibration text that a caller hands over in Python: token ids, or plain texts.

Texts may be a list, a generator, or a column of a ``datasets.Dataset``; token ids are
taken as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from compress.calibration.data import load_tokens
from compress.calibration.sources import DOCUMENT_BREAK
from compress.core.errors import CalibrationError

SAMPLES, LENGTH = 128, 512
_MOST_DOCUMENTS = 100_000


def given_windows(calibration: Tensor | Iterable[str] | None, tokenizer: Any) -> Tensor:
    """Return calibration tokens, int64 ``[N, T]``, at most ``[128, 512]`` of texts.

    Args:
        calibration: int64 ``[N, T]``; or texts, which are joined and cut into windows;
            or ``None`` for the bundled mix.
        tokenizer: Of transformers; not needed for tokens.

    Raises:
        CalibrationError: There is no tokenizer, the texts are too short for one window,
            or what was given is neither texts nor tokens.
    """
    if isinstance(calibration, Tensor):
        if calibration.dim() != 2 or calibration.is_floating_point():
            raise CalibrationError(
                f"calibration: a tensor of {tuple(calibration.shape)}, "
                f"{calibration.dtype}; token ids are int64 [N, T]"
            )
        return calibration
    if tokenizer is None:
        raise CalibrationError(
            "this method needs calibration tokens: pass calibration=[N, T] token ids, "
            "or tokenizer= to use texts or the bundled mix"
        )
    if calibration is None:
        return load_tokens(
            "mix", tokenizer, samples=SAMPLES, sequence_length=LENGTH, seed=0
        ).tokens
    return _windows_of(calibration, tokenizer)


def _windows_of(texts: Iterable[str], tokenizer: Any) -> Tensor:
    if isinstance(texts, str):
        raise CalibrationError(
            "calibration: one text; pass a list of texts (a config's calibration.data "
            "takes names of files)"
        )
    ids: list[int] = []
    for text in itertools.islice(texts, _MOST_DOCUMENTS):
        if not isinstance(text, str):
            raise CalibrationError(
                f"calibration: {type(text).__name__} among the texts; pass a column of "
                'a data set, such as calibration=dataset["text"]'
            )
        found = tokenizer(text + DOCUMENT_BREAK, add_special_tokens=False)
        ids += found["input_ids"]
        if len(ids) >= SAMPLES * LENGTH:
            break
    length = min(LENGTH, len(ids))
    if length < 2:
        raise CalibrationError("calibration: the texts have no two tokens; give more")
    count = min(SAMPLES, len(ids) // length)
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)
