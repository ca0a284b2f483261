"""KL, perplexity and top-1 agreement of dense models, by plain transformers.

The base model runs once; its log-probabilities lie in a file. What a runtime would do
to the inputs of linear layers is done here by hooks of a few lines, alike for models of
all tools: no code of ours measures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
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


def fp8_groups(x: Tensor, size: int = 64) -> Tensor:
    """Round each run of ``size`` columns of a token to E4M3."""
    return fp8_tokens(x.unflatten(-1, (-1, size))).flatten(-2)


def fp8_tokens(x: Tensor) -> Tensor:
    """Round each token to E4M3, ``amax / 448``."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": int8_tokens,
    "int8-g64": int8_groups,
    "int8-g32": partial(int8_groups, size=32),
    "e4m3": fp8_tokens,
    "e4m3-g64": fp8_groups,
}


Rounding = str | Mapping[str, str] | None
"""A key of ROUNDINGS for all decoder linears, or one for each that is named."""


@contextmanager
def _rounded_inputs(model: Any, rounding: Rounding) -> Any:
    """Round the inputs of linears of the decoder blocks while inside."""
    hooks = []
    for name, module in model.named_modules():
        linear = name.startswith("model.layers.") and isinstance(
            module, torch.nn.Linear
        )
        key = rounding if isinstance(rounding, str) else (rounding or {}).get(name)
        if linear and key is not None:
            apply = ROUNDINGS[key]
            hook = partial(_round_first, apply)
            hooks.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _round_first(apply: Callable[[Tensor], Tensor], _: Any, args: Any) -> Any:
    return (apply(args[0]), *args[1:])


def rounded_inputs(model: Any, rounding: Rounding) -> AbstractContextManager[None]:
    """Round the inputs of decoder linears while inside."""
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
        """Run the base on the first windows of each of :data:`TEXTS`.

        What an earlier call has left in ``work`` for as many windows is taken as it is.
        """
        texts = {text: windows_of(text, tokenizer)[:windows] for text in TEXTS}
        ruler = cls(texts, work / f"base-{windows}", device)
        ruler.path.mkdir(parents=True, exist_ok=True)
        base, vocabulary = base.to(device), base.config.vocab_size
        for name, rows in ruler.texts.items():
            file = ruler.path / f"{name}.f32"
            if file.is_file():
                continue
            # Another process may be writing it, too: it is put there whole.
            part = f"{name}.{os.getpid()}"
            kept = ruler._stored(part, rows, vocabulary, "w+")
            for i, window in enumerate(rows):
                kept[i] = log_softmax(base, window.to(device)).cpu().numpy()
            kept.flush()
            (ruler.path / f"{part}.f32").replace(file)
        return ruler

    def _stored(self, name: str, rows: Tensor, vocabulary: int, mode: Any) -> Any:
        shape = (len(rows), LENGTH, vocabulary)
        file = self.path / f"{name}.f32"
        return numpy.memmap(file, numpy.float32, mode, shape=shape)

    @torch.no_grad()
    def measure(self, model: Any, rounding: Rounding = None) -> dict[str, Any]:
        """Return KL, perplexity, its rise over the base's, and top-1 for each text.

        The rise is in percent. Standard errors are of means over windows; that of the
        rise comes from differences in the same window.
        """
        model, row = model.to(self.device), {}
        for name, windows in self.texts.items():
            kept = self._stored(name, windows, model.config.vocab_size, "r")
            figures, nll, own = [], [], []
            for i, window in enumerate(windows):
                p = torch.from_numpy(kept[i].copy()).to(self.device)
                with rounded_inputs(model, rounding):
                    q = log_softmax(model, window.to(self.device))
                figures.append(divergence(p, q))
                target = window[1:, None].to(self.device)
                nll.append(float(-q[:-1].gather(1, target).double().mean()))
                own.append(float(-p[:-1].gather(1, target).double().mean()))
            change = torch.tensor(nll, dtype=torch.float64) - torch.tensor(own)
            kl, top1 = torch.tensor(figures, dtype=torch.float64).T
            row[name] = {
                "kl": float(kl.mean()),
                "kl_se": float(kl.std() / len(kl) ** 0.5),
                "top1": float(top1.mean()),
                "perplexity": float(numpy.exp(numpy.mean(nll))),
                "rise": 100 * float(change.mean().expm1()),
                "rise_se": 100 * float(change.std() / len(change) ** 0.5),
            }
        return row
