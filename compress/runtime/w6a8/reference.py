"""What a W6A8 linear layer computes, in plain torch; the kernels are tested against it.

With codes ``qa[m, k]`` of the inputs, ``qw[n, k]`` of the weights and a run of columns
``G`` in which both scales are constant,

    acc[m, n, G] = sum over k in G of qa[m, k] * qw[n, k]          exactly, in int32
    y[m, n] = cast(sum over G of float(acc) * sa[m, G] * sw[n, G] + bias[n])

where the sum is float32 in ascending order of ``G``, and the cast comes last. The rule
that makes ``qa`` and ``sa`` is that of ``core/inputs.py``: the same numbers on every
device. A row with a NaN or an infinity has the scale NaN, and so has its output.

Exactness: products are at most ``32 * 127``, so a float32 matmul of codes is exact over
1024 columns (below ``2**22``), in any order; longer runs are added as integers.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from compress.core.inputs import quantize_inputs
from compress.core.scheme import InputScheme

_EXACT_COLUMNS = 1024


def quantize_activations(inputs: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    """Return codes and scales of inputs.

    Args:
        inputs: float ``[..., K]``.
        group: Columns that share a scale; must divide ``K``. ``None`` is the whole row.

    Returns:
        int8 ``[M, K]`` in ``[-127, 127]`` and float32 ``[M, K / group]``.

    Raises:
        SchemeError: The group does not divide ``K``.
    """
    columns = inputs.shape[-1]
    levels, scale = quantize_inputs(
        inputs.reshape(-1, columns), InputScheme("int8", group)
    )
    return levels.flatten(1).to(torch.int8), scale.squeeze(-1)


def run_sums(inputs: Tensor, weights: Tensor, run: int) -> Tensor:
    """Return the exact sums of products over each run of columns.

    Args:
        inputs: int8 ``[M, K]``.
        weights: int8 ``[N, K]``.
        run: Columns of a run; the last one may be shorter.

    Returns:
        int32 ``[M, ceil(K / run), N]``.
    """
    parts = zip(torch.split(inputs, run, 1), torch.split(weights, run, 1), strict=True)
    return torch.stack([_exact_product(a, w) for a, w in parts], 1)


def linear(
    inputs: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``inputs @ weights.T + bias`` of codes under scales.

    Args:
        inputs: int8 ``[M, K]`` and float32 ``[M, Ga]``; ``Ga`` divides ``K``.
        weights: int8 ``[N, K]`` and ``[N, Gw]`` of any float type; likewise.
        bias: ``[N]`` or ``None``.
        dtype: Of the result.

    Returns:
        ``[M, N]``.
    """
    (qa, sa), (qw, sw) = inputs, weights
    columns = qa.shape[1]
    of_inputs, of_weights = columns // sa.shape[1], columns // sw.shape[1]
    run = gcd(of_inputs, of_weights)
    total = torch.zeros(len(qa), len(qw), dtype=torch.float32, device=qa.device)
    for start in range(0, columns, run):
        part = slice(start, start + run)
        sums = _exact_product(qa[:, part], qw[:, part]).float()
        left = sa[:, start // of_inputs, None]
        total += sums * left * sw[:, start // of_weights].float()
    if bias is not None:
        total += bias.float()
    return total.to(dtype)


def _exact_product(inputs: Tensor, weights: Tensor) -> Tensor:
    """Return the int32 ``[M, N]`` product of int8 codes."""
    total = torch.zeros(
        len(inputs), len(weights), dtype=torch.int32, device=inputs.device
    )
    of_inputs = torch.split(inputs, _EXACT_COLUMNS, 1)
    for a, w in zip(of_inputs, torch.split(weights, _EXACT_COLUMNS, 1), strict=True):
        total += (a.float() @ w.float().t()).int()
    return total
