"""A small model that knows something: the rules by which one symbol follows two."""

from __future__ import annotations

from functools import cache

import torch
from export_fixtures import StateDictSource
from streaming_fixtures import model_of
from torch import Tensor

from compress.model.loading import ModelHandle

SYMBOLS, WIDTH = 48, 96


def grammar(windows: int, seed: int) -> Tensor:
    """Return int64 ``[windows, 24]``: the next symbol is a function of the last two."""
    rules = torch.Generator().manual_seed(9)
    table = torch.randint(SYMBOLS, (SYMBOLS, 4), generator=rules)
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(SYMBOLS, (windows, 24), generator=generator)
    free = torch.rand(text.shape, generator=generator) < 0.1
    for t in range(2, text.shape[1]):
        ruled = table[text[:, t - 1], text[:, t - 2] % 4]
        text[:, t] = torch.where(free[:, t], text[:, t], ruled)
    return text


@cache
def trained_on_grammar() -> ModelHandle:
    """A Llama of three blocks that knows most of the grammar."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fixture of a module comes before that of a test
    model, description, _ = model_of(
        "llama",
        vocab_size=SYMBOLS,
        intermediate_size=WIDTH,
        initializer_range=0.05,
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    text = grammar(2048, seed=1)
    for rows in torch.arange(120 * 32).reshape(120, 32) % len(text):
        loss = model(input_ids=text[rows], labels=text[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    assert float(loss.detach()) < 2.0  # of log 48 = 3.9
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    return ModelHandle(description, StateDictSource(state))
