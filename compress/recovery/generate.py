"""Text that the teacher writes: more of it than the calibration sources have.

A student that sees a small text many times learns it by heart. The teacher's own
samples are free, never repeat, and lie where its predictions have their mass; a text's
truth is not needed, since the loss is the distance to the teacher.

Windows begin with 1, 2, 4 ... 32 tokens from somewhere in the given text, in turn, and
go on by sampling at temperature 1.

Source: Liu et al. (2023), LLM-QAT, arXiv 2305.17888, who begin with a random word;
prompts of several lengths are ours.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from compress.recovery.models import WholeModel
from compress.workdir import write_atomically

_PROMPTS = (1, 2, 4, 8, 16, 32)
# Keys and values of one batch: what bounds how many windows are written at once.
_CACHE_BYTES = {"cuda": 8 << 30, "cpu": 1 << 28}
_MOST_AT_ONCE = 1024


@torch.no_grad()
def generate_windows(
    model: WholeModel, text: Tensor, *, count: int, seed: int
) -> Tensor:
    """Return windows int64 ``[count, T]`` that a model writes, on the CPU.

    Args:
        model: Writes.
        text: int64 ``[N, T]`` that the first tokens are taken from. If all its windows
            begin with the same token, so do the new ones.
        count: Number of windows.
        seed: Of prompts and samples.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    places = torch.Generator().manual_seed(seed)
    size = min(_batch(model, text.shape[1]), count)
    made = []
    starts = range(0, count, size)
    bar = tqdm(starts, desc="teacher's text", leave=False, disable=None)
    for number, start in enumerate(bar):
        length = min(_PROMPTS[number % len(_PROMPTS)], text.shape[1] - 1)
        prompts = _prompts(text, min(size, count - start), length, places)
        made.append(_continue(model, prompts, text.shape[1], generator).cpu())
    return torch.cat(made)


def stored_windows(
    model: WholeModel, text: Tensor, *, count: int, seed: int, file: Path
) -> Tensor:
    """Return :func:`generate_windows`, from a file if it was made before.

    The file is named by whoever knows that model and text are the same.
    """
    from safetensors.torch import load, save

    if file.is_file():
        return load(file.read_bytes())["windows"]
    windows = generate_windows(model, text, count=count, seed=seed)
    write_atomically(file, save({"windows": windows}))
    return windows


def _batch(model: WholeModel, length: int) -> int:
    config = model.description.config
    heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    width = int(config.get("head_dim") or 0) or (
        int(config["hidden_size"]) // int(config["num_attention_heads"])
    )
    window = 2 * model.description.block_count * heads * width * length
    room = _CACHE_BYTES.get(model.device.type, _CACHE_BYTES["cpu"])
    return max(1, min(_MOST_AT_ONCE, room // (window * model.dtype.itemsize)))


def _prompts(
    text: Tensor, count: int, length: int, generator: torch.Generator
) -> Tensor:
    """Return ``[count, length]`` tokens from random places, after BOS if there is."""
    first = text[:, 0]
    begins = len(text) > 1 and bool((first == first[0]).all())
    low, high = int(begins), text.shape[1] - length + 1
    rows = torch.randint(len(text), (count, 1), generator=generator)
    offsets = torch.randint(low, max(high, low + 1), (count, 1), generator=generator)
    columns = (offsets + torch.arange(length)).clamp(max=text.shape[1] - 1)
    prompts = text[rows, columns]
    if begins:
        prompts = torch.cat([first[:1].expand(count, 1), prompts], dim=1)
    return prompts[:, : text.shape[1] - 1]


def _continue(
    model: WholeModel, prompts: Tensor, length: int, generator: torch.Generator
) -> Tensor:
    """Return windows ``[B, length]`` that begin with the prompts, by sampling."""
    from transformers import DynamicCache

    cache = DynamicCache()
    windows = torch.empty(len(prompts), length, dtype=torch.int64, device=model.device)
    filled = prompts.shape[1]
    windows[:, :filled] = prompts.to(model.device)
    fresh = windows[:, :filled]
    while filled < length:
        with model.arithmetic():
            output = model.body(input_ids=fresh, past_key_values=cache, use_cache=True)
        logits = model.head.logits(output.last_hidden_state[:, -1])
        chances = torch.softmax(logits, -1)
        fresh = torch.multinomial(chances, 1, generator=generator)
        windows[:, filled] = fresh[:, 0]
        filled += 1
    return windows
