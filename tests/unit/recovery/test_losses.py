"""Chunked losses equal the plain ones, and hold the logits of a chunk only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from compress.recovery.losses import IGNORED, Head, linear_ce, linear_kl

RAGGED = [(1, 7), (8, 4), (13, 5), (13, 64)]  # tokens, tokens a chunk


def states(tokens: int, width: int = 6, *, seed: int = 0, **kind: object) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(tokens, width, generator=generator).to(**kind)  # type: ignore[call-overload]
    return made.requires_grad_()


def head(
    vocabulary: int = 11,
    *,
    bias: bool = False,
    softcap: float | None = None,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Head:
    weight = states(vocabulary, seed=seed, dtype=dtype)
    shift = states(1, vocabulary, seed=seed + 1, dtype=dtype)[0].detach()
    return Head(weight, shift.requires_grad_() if bias else None, softcap)


def plain_logits(hidden: Tensor, head: Head) -> Tensor:
    z = F.linear(hidden, head.weight, head.bias)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def gradients(loss: Tensor, *leaves: Tensor | None) -> list[Tensor]:
    return list(
        torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])
    )


@pytest.mark.parametrize("tokens, chunk", RAGGED)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_cross_entropy_is_that_of_torch(
    tokens: int, chunk: int, bias: bool, softcap: float | None
) -> None:
    hidden, own = states(tokens), head(bias=bias, softcap=softcap)
    targets = torch.arange(tokens) * 7 % 11
    targets[1::3] = IGNORED
    expected = F.cross_entropy(plain_logits(hidden, own), targets)
    found = linear_ce(hidden, own, targets, chunk=chunk)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    leaves = hidden, own.weight, own.bias
    for mine, theirs in zip(
        gradients(3 * found, *leaves), gradients(3 * expected, *leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens, chunk", RAGGED)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_divergence_is_that_of_torch(
    tokens: int,
    chunk: int,
    temperature: float,
    softcap: float | None,
    *,
    fused: bool = False,
) -> None:
    hidden, own = states(tokens), head(bias=True, softcap=softcap)
    other, teacher = states(tokens, seed=5), head(softcap=softcap, seed=6)
    expected = temperature**2 * F.kl_div(
        (plain_logits(hidden, own) / temperature).log_softmax(-1),
        (plain_logits(other, teacher) / temperature).log_softmax(-1).detach(),
        reduction="batchmean",
        log_target=True,
    )
    options: dict[str, Any] = {"temperature": temperature, "chunk": chunk}
    found = linear_kl(hidden, own, other, teacher, fused=fused, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    leaves = hidden, own.weight, own.bias
    for mine, theirs in zip(
        gradients(found, *leaves), gradients(expected, *leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_fused_divergence_is_the_same(temperature: float) -> None:
    test_divergence_is_that_of_torch(7, 3, temperature, 2.0, fused=True)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradients_are_derivatives(softcap: float | None) -> None:
    hidden = states(5, dtype=torch.float64)
    own = head(bias=True, dtype=torch.float64)
    teacher = head(seed=8, softcap=softcap, dtype=torch.float64)
    other = states(5, seed=9, dtype=torch.float64)
    targets = torch.tensor([3, IGNORED, 0, 10, 3])

    def ce(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_ce(hidden, Head(weight, bias, softcap), targets, chunk=2)

    def kl(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mine = Head(weight, bias, softcap)
        return linear_kl(hidden, mine, other, teacher, temperature=1.7, chunk=2)

    leaves = hidden, own.weight, own.bias
    assert torch.autograd.gradcheck(ce, leaves)
    assert torch.autograd.gradcheck(kl, leaves)


def test_no_counted_token_gives_no_loss_and_no_gradient() -> None:
    hidden, own = states(4), head(bias=True)
    loss = linear_ce(hidden, own, torch.full((4,), IGNORED), chunk=3)
    assert loss.item() == 0
    for gradient in gradients(loss, hidden, own.weight, own.bias):
        assert torch.count_nonzero(gradient) == 0


def test_equal_predictions_have_no_divergence_and_no_gradient() -> None:
    hidden, own = states(9), head(bias=True, softcap=3.0)
    loss = linear_kl(hidden, own, hidden, own, temperature=2.0, chunk=4)
    assert loss.item() == 0
    for gradient in gradients(loss, hidden, own.weight, own.bias):
        assert torch.count_nonzero(gradient) == 0


def test_a_tied_embedding_gets_both_gradients() -> None:
    embedding = nn.Parameter(states(11, seed=3).detach())
    ids = torch.tensor([1, 4, 4, 10, 2])
    targets = torch.tensor([4, 4, 10, 2, 0])

    def gradient(chunked: bool) -> Tensor:
        hidden = torch.tanh(embedding[ids])
        if chunked:
            loss = linear_ce(hidden, Head(embedding), targets, chunk=2)
        else:
            loss = F.cross_entropy(hidden @ embedding.t(), targets)
        return torch.autograd.grad(loss, embedding)[0]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-5, atol=1e-6)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = states(4), head().weight.detach()
    linear_ce(hidden, Head(weight), torch.zeros(4, dtype=torch.int64)).backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_states_in_half_precision_give_a_loss_in_float32() -> None:
    hidden, own = states(8, dtype=torch.bfloat16), head(dtype=torch.bfloat16)
    targets = torch.arange(8)
    loss = linear_ce(hidden, own, targets, chunk=3)
    exact = F.cross_entropy(hidden.float() @ own.weight.float().t(), targets)
    assert loss.dtype == torch.float32
    # On a CPU products of bfloat16 are rounded to it: 2^-8 of logits below 8.
    torch.testing.assert_close(loss, exact, rtol=0, atol=8 * 2**-8)
    (gradient,) = gradients(loss, hidden)
    assert gradient.dtype == torch.bfloat16


class _Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@contextmanager
def largest() -> Iterator[_Largest]:
    with _Largest() as mode:
        yield mode


def test_no_more_logits_are_made_than_those_of_a_chunk() -> None:
    tokens, vocabulary, chunk = 512, 997, 16
    hidden, own, teacher = states(tokens), head(vocabulary), head(vocabulary, seed=4)
    with largest() as seen:
        loss = linear_ce(
            hidden, own, torch.zeros(tokens, dtype=torch.int64), chunk=chunk
        )
        loss = loss + linear_kl(hidden, own, hidden.detach(), teacher, chunk=chunk)
        loss.backward()
    assert seen.elements == chunk * vocabulary  # and never tokens x vocabulary


def test_nothing_is_kept_for_a_backward_pass_that_will_not_come() -> None:
    hidden, own = states(6), head()
    with torch.no_grad():
        loss = linear_ce(hidden, own, torch.zeros(6, dtype=torch.int64))
    assert not loss.requires_grad
