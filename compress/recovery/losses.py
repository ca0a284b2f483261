"""Losses on a head's logits, which are never held for more than a few tokens.

Cross-entropy to labels, and KL divergence to a teacher, straight from hidden states and
the head's weight. With h_t a state, W the head and z_t = W h_t:

    CE: l_t = lse(z_t) - z_t[y_t]            dl/dz = softmax(z) - onehot(y)
    KL: l_t = T^2 sum_v p_v (log p_v - log q_v),   p = softmax(z_teacher / T),
        q = softmax(z_student / T)           dl/dz_student = T (q - p)

The gradient of the logits is known as soon as they are, so each chunk of tokens gives
its loss, its part of dH and its share of dW at once, and its logits are dropped: memory
is O(chunk x V + tokens x C), with no second pass. Logits, softmax and sums are float32
(float64 if the states are), whatever the type of states and head.

Source: Wijmans et al. (2024), "Cut your losses in large-vocabulary language models",
arXiv 2411.09009. What differs: chunks of tokens instead of tiles of a kernel, and no
filter of small gradients. Limits: one mean over all tokens, and no second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that has none."""

CHUNK = 1024
"""Tokens whose logits are held at once."""


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits.

    Attributes:
        weight: ``[V, C]``.
        bias: ``[V]``, if there is one.
        softcap: ``c`` of ``c tanh(z / c)``, the limit that Gemma 2 puts on logits.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return ``[n, V]`` in float32, or float64, for states ``[n, C]``."""
        states = hidden.to(self.weight.dtype)
        halves = states.dtype in (torch.bfloat16, torch.float16)
        if halves and states.is_cuda:  # sums leave the matrix units unrounded
            values = torch.mm(states, self.weight.t(), out_dtype=torch.float32)
        else:
            values = states @ self.weight.t()
        values = values.to(_exact(states.dtype))
        if self.bias is not None:
            values += self.bias
        if self.softcap is not None:
            values = values.div_(self.softcap).tanh_().mul_(self.softcap)
        return values

    def through_softcap_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turn a gradient of capped logits into that of the logits before."""
        if self.softcap is not None:
            gradient *= 1 - (logits / self.softcap).square_()
        return gradient


def linear_ce(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    ignore_index: int = IGNORED,
    chunk: int = CHUNK,
) -> Tensor:
    """Return the mean cross-entropy of the head's predictions, in nats.

    Gradients flow to states, weight and bias, where they are wanted.

    Args:
        hidden: ``[..., C]``.
        head: Its logits are what is scored.
        targets: int64 ``[...]``; already shifted.
        ignore_index: Tokens with this target do not count. If none counts, the loss
            and its gradients are 0.
        chunk: Tokens whose logits are held at once.
    """
    labels = targets.reshape(-1)
    count = (labels != ignore_index).sum().clamp(min=1)

    def score(logits: Tensor, rows: slice, wanted: bool) -> tuple[Tensor, Tensor]:
        own = labels[rows]
        counts = own != ignore_index
        places = own.masked_fill(~counts, 0)[:, None]
        logq = torch.log_softmax(logits, -1)
        loss = -(logq.gather(1, places)[:, 0] * counts).sum() / count
        if not wanted:
            return loss, logq
        gradient = logq.exp_()
        gradient.scatter_add_(1, places, torch.full_like(places, -1, dtype=logq.dtype))
        return loss, gradient.mul_((counts / count)[:, None])

    return _chunked(hidden, head, score, chunk)


def linear_kl(
    student: Tensor,
    student_head: Head,
    teacher: Tensor,
    teacher_head: Head,
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
    fused: bool = False,
) -> Tensor:
    """Return the mean KL divergence from a teacher's predictions, in nats.

    It is multiplied by the squared temperature, so that gradients keep their size.
    Gradients flow to the student's states, weight and bias, where they are wanted, and
    never to the teacher.

    Args:
        student: ``[..., C]``.
        student_head: Its logits are what is trained.
        teacher: ``[..., D]`` for the same tokens; the width may be another one.
        teacher_head: Of the same vocabulary.
        temperature: Divides the logits of both.
        chunk: Tokens whose logits are held at once.
        fused: Let torch.compile fuse what follows the logits.
    """
    states = teacher.detach().reshape(-1, teacher.shape[-1])
    count = len(states)

    divergence = _fused_divergence() if fused else _divergence

    def score(logits: Tensor, rows: slice, wanted: bool) -> tuple[Tensor, Tensor]:
        known = teacher_head.logits(states[rows])
        return divergence(logits, known, temperature, count, wanted)

    return _chunked(student, student_head, score, chunk)


def _divergence(
    student: Tensor, teacher: Tensor, temperature: float, count: int, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Return some tokens' share of the mean KL, and the student's gradient.

    Args:
        student: Logits ``[n, V]``, float32 or float64.
        teacher: As ``student``.
        temperature: Divides both.
        count: Tokens that the mean is over.
        wanted: Whether a gradient is; otherwise the second tensor means nothing.
    """
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    logp = torch.log_softmax(teacher, -1)
    logq = torch.log_softmax(student, -1)
    p = logp.exp()
    loss = (p * logp.sub_(logq)).sum() * (temperature**2 / count)
    if not wanted:
        return loss, logq
    return loss, logq.exp_().sub_(p).mul_(temperature / count)


@cache
def _fused_divergence() -> Any:
    return torch.compile(_divergence, dynamic=True)


Score = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor]]
"""From a chunk's logits and rows: its share of the loss, and, if that is wanted, the
gradient of the logits; it may use the logits up."""


def _chunked(hidden: Tensor, head: Head, score: Score, chunk: int) -> Tensor:
    flat = hidden.reshape(-1, hidden.shape[-1])
    loss: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
        flat,
        head.weight,
        head.bias,
        head.softcap,
        score,
        chunk,
        torch.is_grad_enabled(),
    )
    return loss


class _Chunked(torch.autograd.Function):
    """Sums ``score`` over chunks; gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        score: Score,
        chunk: int,
        recording: bool,
    ) -> Tensor:
        head = Head(weight, bias, softcap)
        wanted = [recording and needed for needed in ctx.needs_input_grad[:3]]
        exact = _exact(weight.dtype)
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        d_bias = (
            torch.zeros_like(bias, dtype=exact)
            if wanted[2] and bias is not None
            else None
        )
        total = torch.zeros((), dtype=exact, device=hidden.device)
        for rows in _slices(len(hidden), chunk):
            logits = head.logits(hidden[rows])
            loss, gradient = score(logits, rows, any(wanted))
            total += loss
            if not any(wanted):
                continue
            gradient = head.through_softcap_(gradient, logits)
            if d_bias is not None:
                d_bias += gradient.sum(0)
            gradient = gradient.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[rows] = (gradient @ weight).to(hidden.dtype)
            if d_weight is not None:
                d_weight += gradient.t() @ hidden[rows].to(weight.dtype)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.types = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = [
            None if part is None else (part * gradient).to(dtype)
            for part, dtype in zip(ctx.saved_tensors, ctx.types, strict=True)
        ]
        return (*found, None, None, None, None)


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
