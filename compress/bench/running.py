"""Measures one way of running a model; called in a process of its own."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor, nn

from compress.bench.counters import Counters, Sampler, counters_for
from compress.bench.decoding import Generator
from compress.bench.efficiency import flops_utilization, joules_per_token, usage_of
from compress.bench.int8_linear import Int8Linear, with_int8_
from compress.bench.llamacpp import LlamaGenerator, LlamaModel
from compress.bench.model import DENSE, INT8, SERVED, ModelSettings
from compress.bench.random_models import is_random, random_model
from compress.core.errors import CheckpointError
from compress.runtime.load import load
from compress.runtime.w6a8.linear import W6A8Linear

_LEAST_SECONDS = 2.0  # of a sampled span: twenty readings


def measure(settings: ModelSettings, way: str) -> dict[str, Any]:
    """Return figures of a model that is loaded for this.

    Args:
        settings: What is measured.
        way: ``dense``, ``int8`` or ``served``.

    Raises:
        CheckpointError: The folder cannot be loaded in this way.
    """
    device = torch.device(settings.device)
    counters = counters_for(device)
    idle = _idle_watts(counters, settings.idle_seconds)
    start = time.perf_counter()
    model = _open(settings, way, device)
    _wait(device)
    found: dict[str, Any] = {
        "way": way,
        "label": model.label,
        "device": _device_name(device),
        "load_seconds": time.perf_counter() - start,
        "params": model.parameters,
        "weights_bytes": model.weights_bytes,
        "idle_power_w": idle,
        "counters": counters.source,
    }
    with torch.inference_mode():
        peak = _peak_flops(device, model.dtype)
        found["peak_flops"] = peak
        found["prefill"] = _guarded(_prefill, model, settings, device)
        found["requests"] = [
            {"batch": batch}
            | _guarded(_requests, model, settings, device, counters, batch, idle, peak)
            for batch in settings.batches
        ]
    return found


def weights_bytes(model: nn.Module) -> int:
    """Return the memory of parameters and buffers, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def parameter_count(model: nn.Module) -> int:
    """Return how many numbers a model has, in codes or not, shared ones once."""
    coded = sum(
        module.in_features * module.out_features
        for module in model.modules()
        if isinstance(module, (W6A8Linear, Int8Linear))
    )
    return coded + sum(parameter.numel() for parameter in model.parameters())


def multiplied_count(model: nn.Module) -> int:
    """Return how many weights a token is multiplied by in linear layers."""
    return sum(
        module.in_features * module.out_features
        for module in model.modules()
        if isinstance(module, (W6A8Linear, Int8Linear, nn.Linear))
    )


def spread(values: list[float]) -> dict[str, float]:
    """Return median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "p25": values[0], "p75": values[0]}
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return {"median": middle, "p25": low, "p75": high}


class TorchModel:
    """A model of torch, as it is measured.

    Args:
        model: Of transformers, on its device.
        label: How it is run, in words.
        compiled: Run it through ``torch.compile``.
    """

    run_as = "eager"

    def __init__(self, model: Any, label: str, *, compiled: bool = False) -> None:
        self._model, self.label = model, label
        self.parameters = parameter_count(model)
        self.weights_bytes = weights_bytes(model)
        self.multiplied = multiplied_count(model)
        self.dtype: torch.dtype = model.dtype
        self.vocabulary = int(model.config.vocab_size)
        if compiled:
            model.forward = torch.compile(model.forward, dynamic=False)

    def generator(self, prompts: Tensor, new_tokens: int) -> Generator:
        """Return what continues prompts, int64 ``[B, T]``; a CUDA graph on a GPU."""
        device = next(self._model.parameters()).device
        generator = Generator(self._model, prompts.to(device), new_tokens)
        generator.prefill()
        if device.type == "cuda":
            generator.capture()
        return generator


def _open(
    settings: ModelSettings, way: str, device: torch.device
) -> TorchModel | LlamaModel:
    """Return the model to measure: a GGUF file in llama.cpp, all else in torch."""
    dense = settings.original or settings.folder
    file = settings.folder if way == SERVED else dense
    if file.suffix == ".gguf":
        if way == INT8:
            raise CheckpointError(f"{file}: int8 is a way of torch, not of llama.cpp")
        return LlamaModel(file)
    model = _load(settings, way, device)
    return TorchModel(model, _label(settings, way, model), compiled=settings.compiled)


def _load(settings: ModelSettings, way: str, device: torch.device) -> Any:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    folder: Path = settings.folder
    served = way == SERVED
    model: Any
    if is_random(str(folder)):
        model = random_model(str(folder), dtype=dtype, device=device, served=served)
    else:
        folder = folder if served else settings.original or folder
        model = load(folder, dtype=dtype, device=device, as_served=served)
    return with_int8_(model) if way == INT8 else model


def _label(settings: ModelSettings, way: str, model: Any) -> str:
    name = str(model.dtype).removeprefix("torch.")
    if way == INT8:
        return f"W8A8 by torch._int_mm in {name}"
    if way == DENSE:
        of = "original" if settings.original else "decoded weights"
        if is_random(str(settings.folder)):
            of = "random weights"
        return f"{name}, {of}"
    schemes = {m.scheme.name for m in model.modules() if isinstance(m, W6A8Linear)}
    return f"{', '.join(sorted(schemes))} in {name}"


def _prefill(
    model: TorchModel | LlamaModel, settings: ModelSettings, device: torch.device
) -> dict[str, Any]:
    generator = _generator(model, settings, (1, settings.prefill_tokens), 1)
    for _ in range(settings.warm_up):
        generator.prefill()
    seconds = [_timed(generator.prefill, device) for _ in range(settings.runs)]
    found = spread(seconds)
    return {
        "tokens": settings.prefill_tokens,
        "seconds": found,
        "tok_s": settings.prefill_tokens / found["median"],
        **_how(model, generator),
    }


def _requests(
    model: TorchModel | LlamaModel,
    settings: ModelSettings,
    device: torch.device,
    counters: Counters,
    batch: int,
    idle: float | None,
    peak: float,
) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    shape = (batch, settings.context_tokens)
    generator = _generator(model, settings, shape, settings.new_tokens)
    for _ in range(settings.warm_up):
        _request(generator, settings.new_tokens, device)
    first, steps = [], []
    for _ in range(settings.runs):
        ttft, rest = _request(generator, settings.new_tokens, device)
        first.append(ttft)
        steps.append(rest / settings.new_tokens)
    made, begun = 0, time.perf_counter()
    with Sampler(counters) as sampler:
        while not made or time.perf_counter() - begun < _LEAST_SECONDS:
            generator.rewind()
            for _ in range(settings.new_tokens):
                generator.step()
            _wait(device)
            made += batch * settings.new_tokens
    usage = usage_of(sampler.trace)
    itl = spread(steps)
    rate = batch / itl["median"]
    return {
        "ttft_s": spread(first),
        "itl_s": itl,
        "al_s": _median_sum(first, steps, settings.new_tokens),
        "it_tok_s": rate,
        "generated_tokens": made,
        "kv_bytes": generator.kv_bytes,
        "peak_gb": _peak_gb(device),
        "amu_gb": None if usage.amu_bytes is None else usage.amu_bytes / 1e9,
        "pcu": usage.pcu,
        "mfu": flops_utilization(model.multiplied, rate, peak),
        "power_w": usage.power_watts,
        "j_per_token": joules_per_token(usage, made, idle_watts=idle),
        **_how(model, generator),
    }


def _generator(
    model: TorchModel | LlamaModel,
    settings: ModelSettings,
    shape: tuple[int, int],
    new_tokens: int,
) -> Generator | LlamaGenerator:
    random = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(0, model.vocabulary, shape, generator=random)
    generator = model.generator(ids, new_tokens)
    generator.prefill()
    return generator


def _request(
    generator: Generator | LlamaGenerator, new_tokens: int, device: torch.device
) -> tuple[float, float]:
    """Return the seconds to the first token, and those of all that follow."""
    first = _timed(generator.prefill, device)

    def rest() -> None:
        for _ in range(new_tokens):
            generator.step()

    return first, _timed(rest, device)


def _timed(work: Any, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _guarded(work: Any, *arguments: Any) -> dict[str, Any]:
    """Return what was measured, or the error where memory did not suffice."""
    try:
        return dict(work(*arguments))
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return {"error": str(error).splitlines()[0]}


def _how(
    model: TorchModel | LlamaModel, generator: Generator | LlamaGenerator
) -> dict[str, Any]:
    """Return how steps were run, once the generator's memory is given back."""
    generator.close()
    return {
        "run_as": model.run_as,
        "cuda_graph": generator.is_captured,
        "no_graph": generator.refusal,
    }


def _median_sum(first: list[float], steps: list[float], new_tokens: int) -> float:
    """Return the mean time of a request (AL): first token and all others."""
    whole = [a + b * new_tokens for a, b in zip(first, steps, strict=True)]
    return sum(whole) / len(whole)


def _peak_gb(device: torch.device) -> dict[str, float] | None:
    if device.type != "cuda":
        return None
    return {
        "allocated": torch.cuda.max_memory_allocated(device) / 1e9,
        "reserved": torch.cuda.max_memory_reserved(device) / 1e9,
    }


def _idle_watts(counters: Counters, seconds: float) -> float | None:
    """Return the power of the device before anything runs."""
    if counters.sample().power_watts is None and counters.energy_joules() is None:
        return None
    with Sampler(counters) as sampler:
        time.sleep(seconds)
    return usage_of(sampler.trace).power_watts


def _peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return operations a second of a large product, as measured here."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    best = min(_timed(lambda: a @ a, device) for _ in range(5))
    return 2 * size**3 / best


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
