"""Perplexity protocols: windows, special tokens, and which predictions count."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from compress.core.errors import ConfigError
from compress.evaluation.perplexity import cut_windows

BOS = 7


class Characters:
    """A tokenizer with one token for each character, and BOS before a text."""

    def __init__(self, bos: int | None = BOS, adds: bool = True) -> None:
        self.bos_token_id = bos
        self._adds = adds

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        ids = [100 + ord(c) for c in text]
        first = [self.bos_token_id] if self._adds and add_special_tokens else []
        return {"input_ids": [*first, *ids]}  # type: ignore[list-item]


TEXT = "".join(chr(i % 97) for i in range(5000))
IDS = [100 + ord(c) for c in TEXT]


def cut(protocol: str, tokenizer: Characters, text: str = TEXT, **sizes: int):
    sizes = {"count": 3, "length": 64} | sizes
    return cut_windows(text, tokenizer, protocol=protocol, name="text", **sizes)


def test_windows_are_the_first_ones_without_overlap() -> None:
    found = cut("windows", Characters())
    assert found.protocol == "windows3x64"
    assert (found.first, found.predictions) == (0, 3 * 63)
    assert found.ids.dtype == torch.int64
    assert found.ids.flatten().tolist() == [BOS, *IDS][: 3 * 64]


def test_a_short_text_gives_fewer_windows_and_says_so() -> None:
    found = cut("windows", Characters(adds=False), TEXT[:130])
    assert (found.protocol, len(found.ids)) == ("windows2x64", 2)


def test_hf2048_tokenizes_once_with_the_defaults() -> None:
    found = cut("hf2048", Characters(), count=1)
    assert found.ids.shape == (2, 2048)  # all whole windows, whatever count says
    assert found.ids.flatten().tolist() == [BOS, *IDS][:4096]
    assert (found.protocol, found.first) == ("hf2048", 0)


def test_llamacpp512_begins_each_window_with_bos_and_counts_its_second_half() -> None:
    found = cut("llamacpp512", Characters())
    assert found.ids.shape == (9, 512)
    assert found.ids[:, 0].tolist() == [BOS] * 9
    # BOS takes the place of each window's first token; it does not shift the text.
    stream = [BOS, *IDS]
    assert found.ids[1, 1:].tolist() == stream[513:1024]
    # Positions 256 to 510 predict: 255 in each window, as in llama.cpp.
    assert (found.first, found.predictions) == (256, 9 * 255)


@pytest.mark.parametrize(
    "tokenizer", [Characters(None, adds=False), Characters(BOS, adds=False)]
)
def test_llamacpp512_adds_no_bos_where_the_model_uses_none(
    tokenizer: Characters,
) -> None:
    found = cut("llamacpp512", tokenizer)
    assert found.ids.flatten().tolist() == IDS[: 9 * 512]


@pytest.mark.parametrize("protocol", ["windows", "hf2048", "llamacpp512"])
def test_a_text_of_less_than_a_window_is_refused(protocol: str) -> None:
    with pytest.raises(ConfigError, match=r"text 'text' has 11 tokens, less than one"):
        cut(protocol, Characters(), "0123456789")


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown protocol 'hf'; use windows, hf2048"):
        cut_windows(
            TEXT, SimpleNamespace(), protocol="hf", count=1, length=2, name="text"
        )
