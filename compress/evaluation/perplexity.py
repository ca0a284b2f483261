"""Perplexity protocols: how a text becomes windows, and which predictions count.

Figures of different protocols are never comparable, so each carries its protocol's
name.

* ``windows``: the first N non-overlapping windows of a chosen length, every prediction
  counts. Short, for reports; the length is part of the name (``windows10x1024``).
* ``hf2048``: the GPTQ papers. Rows joined as their authors do, tokenized once with the
  tokenizer's defaults, all whole windows of 2048, every prediction counts.
* ``llamacpp512``: llama.cpp's perplexity tool. The raw text, windows of 512 whose first
  token is BOS where the model uses one, and only positions 256 to 510 predict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.core.errors import ConfigError

PROTOCOLS = ("windows", "hf2048", "llamacpp512")


@dataclass(frozen=True)
class TokenWindows:
    """Token ids and the predictions that count.

    Attributes:
        protocol: Full name, with the sizes where they are a choice.
        ids: int64 ``[N, T]``; each row is a forward pass of its own.
        first: First position whose prediction of the next token counts.
    """

    protocol: str
    ids: Tensor
    first: int = 0

    @property
    def predictions(self) -> int:
        """How many predictions count in all."""
        return self.ids.shape[0] * (self.ids.shape[1] - 1 - self.first)


def cut_windows(
    text: str, tokenizer: Any, *, protocol: str, count: int, length: int, name: str
) -> TokenWindows:
    """Return the windows of ``text`` under a protocol.

    Args:
        text: In the form the protocol asks for (rows joined, or raw).
        tokenizer: A transformers tokenizer.
        protocol: One of :data:`PROTOCOLS`.
        count: Windows at most, for ``windows`` only.
        length: Tokens of a window, for ``windows`` only.
        name: Of the text, for messages.

    Raises:
        ConfigError: The protocol is unknown or the text is shorter than one window.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"unknown protocol {protocol!r}; use {', '.join(PROTOCOLS)}")
    llamacpp = protocol == "llamacpp512"
    length = {"hf2048": 2048, "llamacpp512": 512}.get(protocol, length)
    ids = tokenizer(text, add_special_tokens=not llamacpp, verbose=False)["input_ids"]
    bos = _bos(tokenizer) if llamacpp else None
    if bos is not None:
        ids = [bos, *ids]
    whole = len(ids) // length
    if whole == 0:
        raise ConfigError(
            f"text {name!r} has {len(ids)} tokens, less than one window of {length}; "
            "use a longer text or a smaller evaluate.sequence_length"
        )
    if protocol == "windows":
        whole = min(whole, count)
        protocol = f"windows{whole}x{length}"
    windows = torch.tensor(ids[: whole * length], dtype=torch.int64).view(whole, length)
    if bos is not None:
        windows[:, 0] = bos
    return TokenWindows(protocol, windows, length // 2 if llamacpp else 0)


def first_windows(windows: TokenWindows, tokens: int) -> TokenWindows:
    """Return the windows within the first ``tokens``, at least one.

    If some are left out the name of the protocol says so, since it is another figure.
    """
    total, length = windows.ids.shape
    kept = min(total, max(1, tokens // length))
    if kept == total:
        return windows
    protocol = f"{windows.protocol}, first {kept} of {total} windows"
    return TokenWindows(protocol, windows.ids[:kept], windows.first)


def _bos(tokenizer: Any) -> int | None:
    """Return BOS if the tokenizer puts it before a text."""
    bos = tokenizer.bos_token_id
    probe = tokenizer("a", verbose=False)["input_ids"]
    return bos if bos is not None and probe[:1] == [bos] else None
