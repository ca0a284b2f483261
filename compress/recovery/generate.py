"""Text that the teacher writes: more of it than the calibration sources have.

A student that sees a small text many times learns it by heart. The teacher's own
samples are free, never repeat, and lie where its predictions have their mass; a text's
truth is not needed, since the loss is the distance to the teacher.

Windows begin with 1, 2, 4 ... tokens from somewhere in the given text, at most half a
window of them, and go on by sampling at temperature 1.

Source: Liu et al. (2023), LLM-QAT, arXiv 2305.17888, who begin with a random word;
prompts of several lengths are ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.config.training_options import TrainingOptions
from compress.core.artifact import TensorSource
from compress.distributed.team import Team
from compress.progress import progress_bar
from compress.provenance import digest_of, weights_digest
from compress.recovery.models import WholeModel
from compress.recovery.text import RecoveryText
from compress.workdir import write_atomically

# Keys and values of one batch bound how many windows are written at once: a share of
# what the weights leave of a GPU, where a step takes as long for many windows as for
# few. The logits of a token of each need room as well.
_CACHE_SHARE = 0.6
CACHE_BYTES = 1 << 28
_MOST_AT_ONCE = 1 << 14
_MOST_IN_TIME = 1 << 16  # windows, where time ends writing


@torch.no_grad()
def generate_windows(
    model: WholeModel,
    text: Tensor,
    *,
    count: int,
    seed: int,
    seconds: float | None = None,
) -> Tensor:
    """Return windows int64 ``[count, T]`` that a model writes, on the CPU.

    Args:
        model: Writes.
        text: int64 ``[N, T]`` that the first tokens are taken from. If all its windows
            begin with the same token, so do the new ones.
        count: Number of windows.
        seed: Of prompts and samples.
        seconds: After which no more are begun, if there is any.
    """
    ends = math.inf if seconds is None else time.monotonic() + seconds
    generator = torch.Generator(model.device).manual_seed(seed)
    # Batches of one size, since kernels are planned for each; what is over is dropped.
    batches = math.ceil(count / _batch(model, text.shape[1]))
    size = math.ceil(count / batches)
    draw = torch.Generator().manual_seed(seed)
    prompts, lengths = _prompts(text, batches * size, draw)
    parts = zip(torch.split(prompts, size), torch.split(lengths, size), strict=True)
    made = []
    for given, own in progress_bar(
        parts, total=batches, desc="teacher's text", leave=False
    ):
        made.append(_continue(model, given, own, text.shape[1], generator).cpu())
        if time.monotonic() >= ends:
            break
    return torch.cat(made)[:count]


def stored_windows(
    model: Callable[[], WholeModel],
    text: Tensor,
    *,
    count: int,
    seed: int,
    file: Path,
    seconds: float | None = None,
) -> Tensor:
    """Return :func:`generate_windows`, from a file if it was made before.

    ``model`` returns the one that writes, and is not called for nothing.
    The file is named by whoever knows that model and text are the same.
    """
    from safetensors.torch import load, save

    if file.is_file():
        return load(file.read_bytes())["windows"]
    windows = generate_windows(model(), text, count=count, seed=seed, seconds=seconds)
    write_atomically(file, save({"windows": windows}))
    return windows


def training_windows(
    teacher: WholeModel,
    text: RecoveryText,
    options: TrainingOptions,
    *,
    team: Team,
    weights: TensorSource,
    state: Path,
) -> Tensor:
    """Return the given windows, and those that the teacher writes, ``[N, T]``.

    Args:
        teacher: Writes.
        text: What is given.
        options: Say how many are written.
        team: The first process writes.
        weights: Of the teacher, as they are stored.
        state: Folder in which they are kept.
    """
    given, seed, seconds = text.train, options.seed, options.writing_seconds
    if not options.writes:
        return given
    count = options.generated or _MOST_IN_TIME
    digest = weights_digest(weights)
    made_from = [text.digest, digest, count, seconds, seed, str(teacher.dtype)]
    file = state / f"generated-{digest_of(made_from)[:12]}.safetensors"
    wanted: dict[str, Any] = {"count": count, "seed": seed, "seconds": seconds}
    if team.rank == 0:
        stored_windows(lambda: teacher, given, **wanted, file=file)
        if teacher.device.type == "cuda":  # keys and values took much; others may run
            torch.cuda.empty_cache()
    team.wait()
    written = stored_windows(lambda: teacher, given, **wanted, file=file)
    return torch.cat([given, written])


def _batch(model: WholeModel, length: int) -> int:
    config = model.description.config
    heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    width = int(config.get("head_dim") or 0) or (
        int(config["hidden_size"]) // int(config["num_attention_heads"])
    )
    window = 2 * model.description.block_count * heads * width * length
    room = CACHE_BYTES
    if model.device.type == "cuda":
        memory = torch.cuda.get_device_properties(model.device).total_memory
        weights = sum(weight.nbytes for weight in model.module.parameters())
        room = int(_CACHE_SHARE * (memory - weights))
    return max(1, min(_MOST_AT_ONCE, room // (window * model.dtype.itemsize)))


def _prompts(
    text: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return tokens from random places, after BOS if there is, and how many count.

    Returns:
        int64 ``[count, P]`` and ``[count]``.
    """
    first = text[:, 0]
    begins = len(text) > 1 and bool((first == first[0]).all())
    low = int(begins)
    choices = [1 << power for power in range((text.shape[1] // 2).bit_length())]
    longest = min(choices[-1], text.shape[1] - 1 - low)
    rows = torch.randint(len(text), (count, 1), generator=generator)
    last = text.shape[1] - longest
    offsets = torch.randint(low, last + 1, (count, 1), generator=generator)
    prompts = text[rows, offsets + torch.arange(longest)]
    lengths = torch.tensor(choices).repeat(-(-count // len(choices)))[:count]
    if begins:
        prompts = torch.cat([first[:1].expand(count, 1), prompts], dim=1)
    return prompts, lengths.clamp(max=longest) + low


def _continue(
    model: WholeModel,
    prompts: Tensor,
    lengths: Tensor,
    length: int,
    generator: torch.Generator,
) -> Tensor:
    """Return windows ``[B, length]`` that begin with the prompts, by sampling.

    Prompts are of different lengths: where one still goes on, its token is taken
    instead of the sample.
    """
    prompts, lengths = prompts.to(model.device), lengths.to(model.device)
    cache = _cache(model, length)
    windows = torch.empty(len(prompts), length, dtype=torch.int64, device=model.device)
    fresh = windows[:, 0] = prompts[:, 0]
    for place in range(1, length):
        with model.arithmetic():
            output = model.body(
                input_ids=fresh[:, None], past_key_values=cache, use_cache=True
            )
        logits = model.head.logits(output.last_hidden_state[:, -1])
        chances = torch.softmax(logits, -1)
        fresh = torch.multinomial(chances, 1, generator=generator)[:, 0]
        if place < prompts.shape[1]:
            fresh = torch.where(place < lengths, prompts[:, place], fresh)
        windows[:, place] = fresh
    return windows


def _cache(model: WholeModel, length: int) -> Any:
    """Return a cache of keys and values that does not move when it grows.

    Layers that see all tokens get room for ``length`` of them, and give views of it;
    those with a sliding window stay as transformers has them.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Room(DynamicLayer):  # type: ignore[misc]
        """Keys and values ``[B, heads, T, width]`` in one place from the start."""

        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            """Put in the new ones; returns views of all that are there."""
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.rooms = [_room(key_states), _room(value_states)]
            start = self.get_seq_length()
            end = start + key_states.shape[-2]
            for room, new in zip(self.rooms, (key_states, value_states), strict=True):
                room[:, :, start:end] = new
            keys, values = (room[:, :, :end] for room in self.rooms)
            self.keys, self.values = keys, values
            return keys, values

    def _room(new: Tensor) -> Tensor:
        batch, heads, _, width = new.shape
        return new.new_empty(batch, heads, length, width)

    cache = DynamicCache(config=model.body.config)
    layers = cache.layers
    layers[:] = [Room() if type(each) is DynamicLayer else each for each in layers]
    return cache
