"""What base and compressed model write after the same prompts, for a reader to judge.

Greedy and in plain text, without a chat template: each token is the most probable one,
so that two runs agree and a difference is the compression's. After the first other
token two texts are no longer about the same prefix, so how late that comes says more
than how many words are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    stop = tokenizer.eos_token_id
    written = {}
    for name, load in models.items():
        model = load()
        written[name] = [
            _until(row, stop) for row in continue_greedily(model, ids, tokens=tokens)
        ]
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
    model: WholeModel, prompts: Sequence[Sequence[int]], *, tokens: int
) -> list[list[int]]:
    """Return the ``tokens`` most probable ids after each prompt, one after another.

    All prompts advance together from their first token, without padding: where one
    still goes on, its next token is taken instead of the model's.

    Args:
        model: Whole on its device.
        prompts: Token ids, at least one each; lengths may differ.
        tokens: To write after each.
    """
    from transformers import DynamicCache

    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    rows = torch.zeros(len(prompts), longest + tokens, dtype=torch.int64)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    rows, own = rows.to(model.device), lengths.to(model.device)
    cache = DynamicCache(config=model.body.config)
    steps = range(1, longest + tokens)
    for place in progress_bar(steps, desc="samples", unit="token", leave=False):
        with model.arithmetic():
            output = model.body(
                input_ids=rows[:, place - 1, None],
                past_key_values=cache,
                use_cache=True,
            )
        best = model.head.logits(output.last_hidden_state[:, -1]).argmax(-1)
        rows[:, place] = torch.where(place < own, rows[:, place], best)
    return [
        row[length : length + tokens]
        for row, length in zip(rows.tolist(), lengths.tolist(), strict=True)
    ]


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


def _until(ids: Sequence[int], stop: int | None) -> list[int]:
    """Return the ids before the one that ends a text."""
    return list(ids[: ids.index(stop)]) if stop in ids else list(ids)


def _same(first: Sequence[int], second: Iterable[int]) -> int:
    """Return how many leading ids are equal."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
