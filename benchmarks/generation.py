"""Greedy generation: answers to prompts, and speed and energy at a fixed length.

Speed is that of plain transformers, prefill included, with the end-of-text token
suppressed, so that all models write the same number of tokens; how much a model writes
when it is free to stop is a figure of its own. Energy is the difference of two reads of
the card's counter (NVML), ``None`` where there is none.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Counter = Callable[[], float]


@torch.inference_mode()
def answers_of(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, tokens: int, batch: int
) -> list[tuple[str, int]]:
    """Return the greedy answer to each prompt, and how many tokens it has.

    Args:
        model: On its device.
        tokenizer: Its tokenizer; its chat template is applied where it has one.
        prompts: User messages.
        tokens: Most that an answer may have; as many if it did not stop.
        batch: Prompts at a time.
    """
    chats = [_as_chat(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(chats)), key=lambda i: len(chats[i]))
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    stops = _stops(model, tokenizer)
    found: dict[int, tuple[str, int]] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer(
            [chats[i] for i in chosen],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        ).to(model.device)
        written = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )[:, inputs["input_ids"].shape[1] :].tolist()
        for i, ids in zip(chosen, written, strict=True):
            length = next(
                (k for k, token in enumerate(ids) if token in stops), len(ids)
            )
            text = tokenizer.decode(ids[:length], skip_special_tokens=True)
            found[i] = text, length
    return [found[i] for i in range(len(prompts))]


def _as_chat(tokenizer: Any, prompt: str) -> str:
    if not tokenizer.chat_template:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(  # type: ignore[no-any-return]
        messages, tokenize=False, add_generation_prompt=True
    )


def _stops(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    found = {tokenizer.eos_token_id, *listed} - {None}
    return sorted(found)


@torch.inference_mode()
def speed_of(
    model: Any,
    prompts: Tensor,
    *,
    tokens: int,
    repeats: int,
    counter: Counter | None,
    idle_watts: float | None,
) -> dict[str, float | None]:
    """Return tokens a second and joules a token of generating a fixed length.

    Args:
        model: On its device.
        prompts: int64 ``[B, T]``.
        tokens: How many every row writes.
        repeats: Measured runs, after one that is not.
        counter: Joules so far.
        idle_watts: What the card takes when idle, for the net figure.
    """

    def generate() -> float:
        _wait(prompts.device)
        started = time.perf_counter()
        written = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        _wait(prompts.device)
        assert written.shape[1] == prompts.shape[1] + tokens
        return time.perf_counter() - started

    generate()
    before = counter() if counter else 0.0
    seconds = [generate() for _ in range(repeats)]
    joules = counter() - before if counter else None
    made = len(prompts) * tokens
    rates = sorted(made / second for second in seconds)
    net = None
    if joules is not None and idle_watts is not None:
        net = (joules - idle_watts * sum(seconds)) / (made * repeats)
    return {
        "tokens_per_second": statistics.median(rates),
        "slowest": rates[0],
        "fastest": rates[-1],
        "joules_per_token": None if joules is None else joules / (made * repeats),
        "net_joules_per_token": net,
    }


def energy_counter(device: str) -> Counter | None:
    """Return a function that reads joules since the driver started, if there is one."""
    if not device.startswith("cuda"):
        return None
    try:
        import pynvml
    except ImportError:
        print("energy is not measured: nvidia-ml-py is not installed", flush=True)
        return None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        print(f"energy is not measured: {error}", flush=True)
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


def idle_watts(counter: Counter | None, seconds: float) -> float | None:
    """Return mean watts while nothing runs."""
    if counter is None:
        return None
    before, started = counter(), time.perf_counter()
    time.sleep(seconds)
    return (counter() - before) / (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
