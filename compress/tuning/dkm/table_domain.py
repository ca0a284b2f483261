"""DKM on distinct values: the same result and gradient without a map of ``[n, K]``.

Weights of 16 bits have few distinct values ``u``. With multiplicities (or summed
importances) ``f_u``, tables ``C(u)`` and soft weights ``F(u, C)`` are functions of
``u``; the layer's weight is ``F[inverse]``. Backward of ``g = dL/dw~`` is

    ``G_u = sum of g over the weights of value u``
    ``dL/dw_i = g_i dF/du + h_u f_i / f_u``,   ``h = vjp of C(u) at (vjp of F to C)(G)``

The first term is each weight's own: it takes ``g_i``, not the sum. The second, the pull
on the tables, is shared by weights of one value in proportion to their importance.

Source: the map of 16-bit weights to a table is uniquification of Cho et al. (2023),
"eDKM", arXiv 2309.00964, section 2.2. Differs: eDKM computes all weights and compresses
what autograd saves; here nothing of size ``n K`` ever exists. Only the index of each
weight and the values are kept; the rounds are computed again in backward. They are few
enough for float64, so that results are more exact than plain DKM in float32. Limits:
tables of single numbers, since vectors of 16-bit numbers hardly repeat. On CUDA, sums
over weights of one value depend on their order in the last bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.core.codebooks import from_stored
from compress.tuning.dkm.assignment import AT_REST
from compress.tuning.dkm.unique import Unique, unique_values

# Numbers that autograd keeps while a part of the groups is computed again; 256 MiB.
_VALUES_AT_ONCE = 1 << 25
_MAPS_A_ROUND = 3


class _Round(torch.autograd.Function):
    """Rounding to bfloat16 that gradients pass unchanged."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor) -> Tensor:
        return weights.bfloat16().to(weights.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def rounded(weights: Tensor) -> Tensor:
    """Return weights rounded to bfloat16 values, in their own type.

    The gradient passes unchanged, without rounding of its own.
    """
    out: Tensor = _Round.apply(weights)  # type: ignore[no-untyped-call]
    return out


class _Cluster(torch.autograd.Function):
    """See :func:`cluster`."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        tables: Tensor,
        temperature: Tensor,
        iterations: int,
        importances: Tensor | None,
        unique: Unique | None,
    ) -> tuple[Tensor, Tensor]:
        found = unique or unique_values(weights, importances)
        values = torch.empty_like(found.values)
        after = torch.empty_like(tables)
        for part in _parts(found.values, tables, iterations):
            of_part = (found.values, found.mass, tables, temperature)
            u, mass, moved, tau = (tensor[part].double() for tensor in of_part)
            moved = _tables(u, mass, moved, tau, iterations)
            after[part], values[part] = moved, _values(u, moved, tau)
        short = found.values.bfloat16()
        exact = torch.equal(short.to(found.values), found.values)
        kept = short if exact else found.values
        ctx.save_for_backward(kept, found.mass, found.stored, tables, temperature)
        ctx.importances, ctx.iterations = importances, iterations
        ctx.mark_non_differentiable(after)
        return values.gather(1, found.inverse), after

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:
        kept, mass, stored, tables, temperature = ctx.saved_tensors
        values = kept.to(mass)
        inverse = from_stored(stored)
        own, shared = torch.empty_like(values), torch.empty_like(values)
        for part in _parts(values, tables, ctx.iterations):
            of_part = (values, mass, tables, temperature)
            u, f, start, tau = (tensor[part].double() for tensor in of_part)
            summed = torch.zeros_like(u)
            summed.scatter_add_(1, inverse[part], gradient[part].double())
            own[part], pulls = _gradients(
                u, f, start, tau, summed, iterations=ctx.iterations
            )
            shared[part] = pulls / f.clamp_min(torch.finfo(shared.dtype).tiny)
        pull = shared.gather(1, inverse)
        if ctx.importances is not None:
            pull *= ctx.importances
        pull.addcmul_(gradient, own.gather(1, inverse))
        return pull, None, None, None, None, None


def _shares(values: Tensor, tables: Tensor, temperature: Tensor) -> Tensor:
    """Return how much each value belongs to each entry, ``[G, K, U]``.

    Entries come first: along a few that lie side by side, softmax takes ten times as
    long.
    """
    gaps = values.unsqueeze(1) - tables.unsqueeze(2)
    return torch.softmax(gaps.square() / -temperature.view(-1, 1, 1), dim=1)


def _tables(
    values: Tensor, mass: Tensor, tables: Tensor, temperature: Tensor, iterations: int
) -> Tensor:
    """Return the tables ``[G, K]`` after so many rounds of soft k-means."""
    rest = mass.sum(1, keepdim=True) * (AT_REST / tables.shape[1])
    rest = rest + torch.finfo(mass.dtype).tiny
    for _ in range(iterations):
        share = _shares(values, tables, temperature) * mass.unsqueeze(1)
        drawn = (share * values.unsqueeze(1)).sum(2)
        tables = (drawn + rest * tables) / (share.sum(2) + rest)
    return tables


def _values(values: Tensor, tables: Tensor, temperature: Tensor) -> Tensor:
    """Return the soft values ``[G, U]``."""
    share = _shares(values, tables, temperature)
    return (share * tables.unsqueeze(2)).sum(1)


@torch.enable_grad()
def _gradients(
    values: Tensor,
    mass: Tensor,
    tables: Tensor,
    temperature: Tensor,
    summed: Tensor,
    *,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Return ``dF/du`` at fixed tables, and the gradient through the tables, by value.

    Args:
        values: ``[G, U]``.
        mass: ``[G, U]``.
        tables: ``[G, K]``.
        temperature: ``[G]``.
        summed: ``[G, U]``, ``G_u``.
        iterations: Rounds.
    """
    u = values.detach().requires_grad_()
    after = _tables(u, mass, tables, temperature, iterations)
    at = values.detach().requires_grad_()
    fixed = after.detach().requires_grad_()
    soft = _values(at, fixed, temperature)
    # F of a value depends on no other value, so a sum has the derivative of each.
    (own,) = torch.autograd.grad(soft.sum(), at, retain_graph=True)
    (pull,) = torch.autograd.grad(soft, fixed, summed)
    if not iterations:
        return own, torch.zeros_like(own)
    (shared,) = torch.autograd.grad(after, u, pull)
    return own, shared


def _parts(values: Tensor, tables: Tensor, iterations: int) -> list[slice]:
    """Return runs of groups that are computed together, which bounds the memory."""
    groups, count = values.shape
    each = count * tables.shape[1] * _MAPS_A_ROUND * (iterations + 1)
    step = max(1, _VALUES_AT_ONCE // each)
    return [slice(start, start + step) for start in range(0, groups, step)]


def cluster(
    weights: Tensor,
    tables: Tensor,
    temperature: Tensor,
    *,
    iterations: int,
    importances: Tensor | None = None,
    unique: Unique | None = None,
) -> tuple[Tensor, Tensor]:
    """Return soft weights and the tables they are made of, as plain DKM would.

    Kept for backward: 2 bytes a weight, and the distinct values of each group, these as
    bfloat16 where nothing is lost by it.

    Args:
        weights: float32 or float64 ``[G, n]``; with few distinct values, such as those
            of :func:`rounded`.
        tables: ``[G, K]`` of the same type, to start from.
        temperature: ``[G]``.
        iterations: Rounds of soft k-means.
        importances: ``[G, n]``, not negative; equal if left out.
        unique: Distinct values of these weights with these importances, if known.

    Returns:
        Soft weights ``[G, n]``, differentiable in ``weights``; tables ``[G, K]``
        without gradient.
    """
    out: tuple[Tensor, Tensor] = _Cluster.apply(  # type: ignore[no-untyped-call]
        weights, tables, temperature, iterations, importances, unique
    )
    return out
