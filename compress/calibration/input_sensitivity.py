"""How much rounding one layer's inputs moves the model's predictions, for all layers.

Wanted is, for each shared input and way of rounding it, ``KL(p || q)`` of the logits
when that input alone is rounded. Measuring it takes a pass through the rest of the
model for each, which for all inputs grows as the square of the depth. Small changes
``d`` of an input ``x`` obey

    KL = 1/2 E[(g . d)^2],   g = d/dx sum_t log p(s_t),   s_t drawn from p_t,

to second order (Fisher information; the draws are independent, so cross terms vanish in
expectation). One forward and one backward pass, block by block, give ``g`` for all
inputs at once; any number of ways of rounding then costs a dot product each. A window
and a draw are one sample of the mean, whose relative standard error is near
``sqrt(2 / samples)``.

Source: of the question, FlexQ (arXiv 2508.04405), whose sensitivity study is offline
and by measurement; of the formula, Fisher information as in natural gradients.
Limits: second order, so large errors are estimated, not measured; callers confirm what
they choose with a true KL of the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.core.inputs import fake_quantize_inputs
from compress.core.scheme import InputScheme
from compress.model.states import Activations
from compress.model.streaming import StreamedModel
from compress.progress import progress_bar

_STORED_BYTES = 1 << 30
"""Block inputs that are held at once; more windows are taken in turn."""
_TOKENS_A_CALL = 1024


@dataclass(frozen=True)
class SharedInput:
    """One input and the layers that read it, which must be rounded alike.

    Attributes:
        block: Number of the block.
        name: Of the input, as in the family table.
        layers: Full names of its readers.
        modes: Ways of rounding it, by a short name; exact is not among them.
    """

    block: int
    name: str
    layers: tuple[str, ...]
    modes: Mapping[str, InputScheme]


_Samples = dict[str, list[Tensor]]
"""For each mode, ``(g . d)^2`` of windows and draws."""


@dataclass(frozen=True)
class Sensitivity:
    """KL in nats a token that rounding one input causes, and its standard error."""

    kl: float
    error: float


def sensitivities(
    model: StreamedModel,
    windows: Tensor,
    inputs: Sequence[SharedInput],
    *,
    draws: int = 2,
    seed: int = 0,
) -> list[dict[str, Sensitivity]]:
    """Return the KL of each mode of each shared input.

    Args:
        model: With exact inputs; the reference.
        windows: int64 ``[N, T]`` tokens.
        inputs: What to rate.
        draws: Labels drawn for each position.
        seed: Of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    samples: list[_Samples] = [{mode: [] for mode in x.modes} for x in inputs]
    width = int(model.description.config["hidden_size"])
    count = model.description.block_count
    each = windows.shape[1] * width * 4 * (count + 1 + draws)
    for part in torch.split(windows, max(1, _STORED_BYTES // each)):
        states, trace = forward_trace(model, part)
        gradients = head_gradients(model, trace.pop(), draws, generator)
        blocks = progress_bar(range(count)[::-1], desc="sensitivity", leave=False)
        for index in blocks:
            pairs = zip(inputs, samples, strict=True)
            mine = [pair for pair in pairs if pair[0].block == index]
            here = Activations(trace.pop(), states.calls)
            with model.block(index, following=index - 1) as block:
                gradients = _through_block(model, index, block, here, gradients, mine)
    tokens = windows.shape[1]
    return [{mode: _summary(x, tokens) for mode, x in t.items()} for t in samples]


def _summary(samples: list[Tensor], tokens: int) -> Sensitivity:
    values = torch.cat(samples) / (2 * tokens)
    spread = float(values.std()) if len(values) > 1 else math.nan
    return Sensitivity(float(values.mean()), spread / math.sqrt(len(values)))


def forward_trace(
    model: StreamedModel, windows: Tensor
) -> tuple[Activations, list[Tensor]]:
    """Return the calls of all blocks, and the inputs of each and of the head."""
    states = model.embed(windows)
    trace = [states.hidden]
    for index in range(model.description.block_count):
        with model.block(index):
            states.hidden = model.run_block(index, states)
        trace.append(states.hidden)
    return states, trace


def head_gradients(
    model: StreamedModel, hidden: Tensor, draws: int, generator: torch.Generator
) -> Tensor:
    """Return ``d/dh sum_t log p(s_t)`` for each draw, float32 ``[D, N, T, C]``."""
    result = torch.empty(draws, *hidden.shape)
    with model.head(on_device=True) as head:
        for n, states in enumerate(hidden):
            states = states.clone().requires_grad_()
            logits = head(states)
            p = torch.softmax(logits.detach(), -1)
            labels = _drawn(p, draws, generator)
            for draw in range(draws):
                # d log p(s) / d logits = onehot(s) - p
                slope = p.neg()
                slope.scatter_add_(1, labels[:, draw, None], torch.ones_like(p[:, :1]))
                (result[draw, n],) = torch.autograd.grad(
                    logits, states, slope, retain_graph=draw + 1 < draws
                )
    return result


def _drawn(p: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Return int64 ``[T, D]``, drawn from rows of ``p``; alike on every device."""
    levels = torch.rand(len(p), draws, generator=generator).to(p)
    heights = p.cumsum(-1)
    found = torch.searchsorted(heights, levels * heights[:, -1:])
    return found.clamp_(max=p.shape[-1] - 1)


def _through_block(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    states: Activations,
    gradients: Tensor,
    inputs: Sequence[tuple[SharedInput, _Samples]],
) -> Tensor:
    """Rate the inputs of a block, and return gradients at the block's own input."""
    prefix = f"{model.description.family.block(index)}."
    result = torch.empty_like(gradients)
    batch = max(1, _TOKENS_A_CALL // states.hidden.shape[1])
    for start in range(0, len(states.hidden), batch):
        rows = slice(start, start + batch)
        hidden = states.hidden[rows].clone().requires_grad_()
        probes = [_Probe(shared, samples) for shared, samples in inputs]
        with _attached(probes, block, prefix):
            output = model.call_block(index, hidden, states.calls[index])
        zeros = [probe.zero for probe in probes]
        for draw in range(len(gradients)):
            down = gradients[draw, rows].to(output)
            result[draw, rows], *slopes = torch.autograd.grad(
                output, [hidden, *zeros], down, retain_graph=draw + 1 < len(gradients)
            )
            for probe, slope in zip(probes, slopes, strict=True):
                probe.sample(slope)
    return result


class _Probe:
    """A zero that is added to an input for all its readers; its gradient is wanted."""

    def __init__(self, shared: SharedInput, samples: _Samples) -> None:
        self.shared, self._samples = shared, samples
        self._zero: Tensor | None = None
        self._changes: dict[str, Tensor] = {}

    @property
    def zero(self) -> Tensor:
        """The leaf of the graph, once a reader has run."""
        assert self._zero is not None, f"{self.shared.name} was not read"
        return self._zero

    def hook(
        self, _module: nn.Module, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Add the zero in front of a reader."""
        if self._zero is None:
            exact = inputs[0].detach()
            self._zero = torch.zeros_like(exact).requires_grad_()
            self._changes = {
                mode: fake_quantize_inputs(exact, scheme) - exact
                for mode, scheme in self.shared.modes.items()
            }
        return (inputs[0] + self._zero, *inputs[1:])

    def sample(self, slope: Tensor) -> None:
        """Note ``(g . d)^2`` of each window, for each mode."""
        for mode, change in self._changes.items():
            moved = (slope * change).sum((1, 2), dtype=torch.float64)
            self._samples[mode].append(moved.square().cpu())


@contextmanager
def _attached(
    probes: Sequence[_Probe], block: nn.Module, prefix: str
) -> Iterator[None]:
    hooks = [
        block.get_submodule(name.removeprefix(prefix)).register_forward_pre_hook(
            probe.hook
        )
        for probe in probes
        for name in probe.shared.layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
