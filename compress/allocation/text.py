"""Text that a search measures on: of the same sources, but no window of calibration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.calibration.data import SourceSpec, load_tokens
from compress.core.errors import CalibrationError

_TRIES = 8


def reward_windows(
    spec: SourceSpec,
    tokenizer: Any,
    *,
    calibration: Tensor,
    count: int,
    length: int,
    seed: int,
) -> Tensor:
    """Return int64 ``[count, min(length, T)]`` windows that calibration has not seen.

    Windows of a source do not overlap unless they are the same one, so it is enough to
    draw with other seeds and to leave those out that calibration drew.

    Args:
        spec: As in ``calibration.data``.
        tokenizer: A transformers tokenizer.
        calibration: int64 ``[N, T]``.
        count: Windows wanted.
        length: Tokens to keep of each.
        seed: Of the calibration text.

    Raises:
        CalibrationError: There is not enough text besides calibration's.
    """
    known = {row.numpy().tobytes() for row in calibration}
    found: dict[bytes, Tensor] = {}
    for offset in range(1, _TRIES + 1):
        drawn = load_tokens(
            spec,
            tokenizer,
            samples=count,
            sequence_length=calibration.shape[1],
            seed=seed + offset,
        )
        for row in drawn.tokens:
            key = row.numpy().tobytes()
            if key not in known:
                found.setdefault(key, row)
        if len(found) >= count:
            return torch.stack(list(found.values())[:count])[:, :length].contiguous()
    raise CalibrationError(
        f"the search wants {count} windows of {calibration.shape[1]} tokens that are "
        f"not among the {len(calibration)} of calibration, and the text has "
        f"{len(found)}; give more text, or lower allocate.windows or "
        "calibration.samples"
    )
