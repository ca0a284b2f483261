"""KL, perplexity and top-1 agreement of dense models, by plain transformers.

The base model runs once; its log-probabilities lie in a file. What a runtime would do
to the inputs of linear layers is done here by hooks of a few lines, alike for models of
all tools: no code of ours measures.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from reference_kl import LENGTH, TEXTS, divergence, log_softmax, windows_of
from torch import Tensor


def int8_tokens(x: Tensor) -> Tensor:
    """Round each token to int8, ``amax / 127``."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round().clamp(-127, 127) * scale


def int8_groups(x: Tensor, size: int = 64) -> Tensor:
    """Round each run of ``size`` columns of a token to int8."""
    return int8_tokens(x.unflatten(-1, (-1, size))).flatten(-2)


def fp8_tokens(x: Tensor) -> Tensor:
    """Round each token to E4M3, ``amax / 448``."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": int8_tokens,
    "int8-g64": int8_groups,
    "e4m3": fp8_tokens,
}


@contextmanager
def _rounded_inputs(model: Any, rounding: str | None) -> Any:
    """Round the inputs of every linear of the decoder blocks while inside."""
    hooks = []
    if rounding is not None:
        apply = ROUNDINGS[rounding]
        hooks = [
            module.register_forward_pre_hook(lambda _, args: (apply(args[0]),))
            for module in model.model.layers.modules()
            if isinstance(module, torch.nn.Linear)
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rounded_inputs(model: Any, rounding: str | None) -> AbstractContextManager[None]:
    """Round the inputs of every decoder linear: ``None`` or a key of ROUNDINGS."""
    return _rounded_inputs(model, rounding)  # type: ignore[no-any-return]


@dataclass
class Ruler:
    """Measures models against a base.

    Attributes:
        texts: int64 ``[N, 1024]`` token windows by name.
        path: Where the base's log-probabilities are kept: float32, memory-mapped.
        device: Where models run.
    """

    texts: dict[str, Tensor]
    path: Path
    device: str

    @classmethod
    def of(
        cls, base: Any, tokenizer: Any, work: Path, *, windows: int, device: str
    ) -> Ruler:
        """Run the base on the first windows of each of :data:`TEXTS`."""
        texts = {text: windows_of(text, tokenizer)[:windows] for text in TEXTS}
        ruler = cls(texts, work / "base", device)
        ruler.path.mkdir(parents=True, exist_ok=True)
        base = base.to(device)
        for name, rows in ruler.texts.items():
            # Another process may be reading the same file: it is replaced whole.
            partial = f"{name}.{os.getpid()}"
            kept = ruler._stored(partial, rows, base.config.vocab_size, "w+")
            for i, window in enumerate(rows):
                kept[i] = log_softmax(base, window.to(device)).cpu().numpy()
            kept.flush()
            (ruler.path / f"{partial}.f32").replace(ruler.path / f"{name}.f32")
        return ruler

    def _stored(self, name: str, rows: Tensor, vocabulary: int, mode: Any) -> Any:
        shape = (len(rows), LENGTH, vocabulary)
        file = self.path / f"{name}.f32"
        return numpy.memmap(file, numpy.float32, mode, shape=shape)

    @torch.no_grad()
    def measure(self, model: Any, rounding: str | None = None) -> dict[str, Any]:
        """Return KL, its standard error, perplexity and top-1 for each text."""
        model, row = model.to(self.device), {}
        for name, windows in self.texts.items():
            kept = self._stored(name, windows, model.config.vocab_size, "r")
            figures, nll = [], []
            for i, window in enumerate(windows):
                p = torch.from_numpy(kept[i].copy()).to(self.device)
                with rounded_inputs(model, rounding):
                    q = log_softmax(model, window.to(self.device))
                figures.append(divergence(p, q))
                target = window[1:, None].to(self.device)
                nll.append(float(-q[:-1].gather(1, target).double().mean()))
            kl, top1 = torch.tensor(figures, dtype=torch.float64).T
            row[name] = {
                "kl": float(kl.mean()),
                "kl_se": float(kl.std() / len(kl) ** 0.5),
                "top1": float(top1.mean()),
                "perplexity": float(numpy.exp(numpy.mean(nll))),
            }
        return row
