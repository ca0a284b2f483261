"""What base and compressed model write after the same prompts, for a reader to judge.

Greedy and in plain text, without a chat template: each token is the most probable one,
so that two runs agree and a difference is the compression's. After the first other
token two texts are no longer about the same prefix, so how late that comes says more
than how many words are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from compress.model.streaming import Rewrite
from compress.progress import progress_bar
from compress.recovery.models import WholeModel

PROMPTS = (
    "Rivers are fresh and the sea is salt, because",
    "Once upon a time an old clockmaker lived at the edge of a forest. One evening",
    "To find out how many days are left until the end of the year, first",
    "def is_prime(n):\n    ",
)
"""The stored prompts: a fact, a tale, an instruction and code; ours."""

_ROUND = 16
"""Tokens between two looks at whether all answers have ended."""


def generations(
    models: Mapping[str, Callable[[], WholeModel]],
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    tokens: int,
) -> dict[str, Any]:
    """Return what each model writes after each prompt.

    One model is in memory at a time.

    Args:
        models: ``base`` and others by name, each loaded when it is called.
        tokenizer: Of all of them.
        prompts: Texts to go on with.
        tokens: Most that are written after each; fewer where a text ends.

    Returns:
        ``tokens``, and ``prompts``: for each its ``prompt``, the ``texts`` by model,
        and ``same_tokens`` by model: how many of the first are those of ``base``.
    """
    ids = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    ends = {tokenizer.eos_token_id}
    written = {}
    for name, load in models.items():
        model = load()
        written[name] = continue_greedily(model, ids, tokens=tokens, ends=ends)
        del model
    return {
        "tokens": tokens,
        "prompts": [
            {
                "prompt": prompt,
                "texts": {
                    name: tokenizer.decode(rows[index], skip_special_tokens=True)
                    for name, rows in written.items()
                },
                "same_tokens": {
                    name: _same(written["base"][index], rows[index])
                    for name, rows in written.items()
                    if name != "base"
                },
            }
            for index, prompt in enumerate(prompts)
        ],
    }


@torch.no_grad()
def continue_greedily(
    model: WholeModel,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    ends: Collection[int | None] = (),
    is_enough: Callable[[Sequence[int]], bool] | None = None,
    new_cache: Callable[[], Any] | None = None,
    name: str = "samples",
) -> list[list[int]]:
    """Return the most probable ids after each prompt, one after another.

    All prompts advance together from their first token, without padding: where one
    still goes on, its next token is taken instead of the model's.

    Args:
        model: Whole on its device.
        prompts: Token ids, at least one each; lengths may differ.
        tokens: To write after each at most.
        ends: Ids that end an answer; they are no part of it.
        is_enough: Whether an answer may stop; asked every :data:`_ROUND` tokens.
        new_cache: Makes the cache of keys and values; an exact one if absent.
        name: Labels the progress bar.
    """
    from transformers import DynamicCache

    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    rows = torch.zeros(len(prompts), longest + tokens, dtype=torch.int64)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    rows, own = rows.to(model.device), lengths.to(model.device)
    cache = new_cache() if new_cache else DynamicCache(config=model.body.config)

    def answers(place: int) -> list[list[int]]:
        return [
            _until(row[length : min(place, length + tokens)], ends)
            for row, length in zip(rows.tolist(), lengths.tolist(), strict=True)
        ]

    steps = range(1, longest + tokens)
    for place in progress_bar(steps, desc=name, unit="token", leave=False):
        with model.arithmetic():
            output = model.body(
                input_ids=rows[:, place - 1, None],
                past_key_values=cache,
                use_cache=True,
            )
        best = model.head.logits(output.last_hidden_state[:, -1]).argmax(-1)
        rows[:, place] = torch.where(place < own, rows[:, place], best)
        if place >= longest and place % _ROUND == 0:
            found = answers(place + 1)
            if all(
                len(answer) < place + 1 - length  # an end was there, or the limit
                or (is_enough is not None and is_enough(answer))
                for answer, length in zip(found, lengths.tolist(), strict=True)
            ):
                return found
    return answers(longest + tokens)


def round_inputs_(module: nn.Module, rounding: Mapping[str, Rewrite]) -> None:
    """Make layers of a model see their inputs as a runtime rounds them.

    Args:
        module: The whole model; it is changed.
        rounding: By layer name.
    """
    for name, rewrite in rounding.items():
        layer = module.get_submodule(name)
        layer.register_forward_pre_hook(_hook(rewrite))


def _hook(rewrite: Rewrite) -> Callable[[nn.Module, tuple[Tensor, ...]], Any]:
    return lambda _, inputs: (rewrite(inputs[0]), *inputs[1:])


def _until(ids: Sequence[int], ends: Collection[int | None]) -> list[int]:
    """Return the ids before the first that ends a text."""
    return list(takewhile(lambda token: token not in ends, ids))


def _same(first: Sequence[int], second: Iterable[int]) -> int:
    """Return how many leading ids are equal."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
