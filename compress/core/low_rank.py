"""A low-rank correction of a quantized matrix, in 8 bits (LoRC).

Rounding leaves an error ``E = W - Q``. Its best approximation of rank ``r`` in the
inputs' metric, ``min tr((E - A B) H (E - A B)^T)``, is the truncated singular value
decomposition of ``E L`` with ``H = L L^T``, multiplied back by ``L^-1``. The factors
``A [R, r]`` and ``B [r, C]`` are rounded to 8 bits: ``B`` with a scale for each row,
then ``A``, refitted to the rounded ``B``, with a scale for each column. They cost
``8 r (R + C) / (R C)`` bits a weight.

Source: Yao et al. (2023), "ZeroQuant-V2" (LoRC), section 5; Wu et al. (2023),
"ZeroQuant-FP". Differs: the decomposition is weighted by ``H`` where there is one, the
second factor is refitted, and a correction that does not bring ``gain`` is left out.

Limits: errors of rounding are close to noise, of which few directions hold little: what
is gained comes from layers whose error has structure. An inference kernel needs a
second, small product, which no stock loader has.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compress.core.tensors import LowRank, QuantizedTensor

LEAST_GAIN = 0.01
_MOST_CODE = 127
_LEAST_DAMP = 1e-4
_SWEEPS = 8  # noise has a flat spectrum, on which fewer would lose some of the gain


def correct(
    weight: Tensor,
    coded: QuantizedTensor,
    *,
    hessian: Tensor | None = None,
    gain: float = LEAST_GAIN,
) -> QuantizedTensor:
    """Return ``coded`` with a correction of its scheme's rank, if that helps.

    Every quantizer ends with this call; it does nothing for schemes without a rank.

    Args:
        weight: float ``[R, C]`` that the codes stand for.
        coded: Its codes.
        hessian: float32 ``[C, C]``, the second moment of the inputs; ``None`` weighs
            all errors alike.
        gain: Share by which the loss has to fall; otherwise the correction is left out
            and a note says so.

    Raises:
        SchemeError: The rank is larger than the matrix.
    """
    rank = coded.scheme.rank
    if not rank:
        return coded
    coded.scheme.check_rank(*coded.shape, "the matrix")
    error = weight.float() - coded.dequantize()
    before = _loss(error, hessian)
    if before > 0:
        factors = _in_8_bits(*_decompose(error, hessian, rank), error, hessian)
        after = _loss(error - factors.product(), hessian)
        if after <= (1 - gain) * before:
            return replace(coded, low_rank=factors)
        gained = 1 - after / before
    else:
        gained = 0.0
    note = f"low-rank correction left out: it would lower the loss by {gained:.2%}"
    return replace(coded, notes=(*coded.notes, note))


def _loss(error: Tensor, hessian: Tensor | None) -> float:
    if hessian is None:
        return float(error.square().sum())
    return float(((error @ hessian) * error).sum())


def _root(hessian: Tensor) -> Tensor:
    """Return lower triangular ``L`` with ``L L^T`` equal to damped ``H``."""
    mean = float(hessian.diagonal().mean())
    damp = _LEAST_DAMP
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damp * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        lower: Tensor = factor
        if not int(failed) and bool(torch.isfinite(lower).all()):
            return lower
        damp *= 10  # in the end the diagonal outweighs all the rest


def _decompose(
    error: Tensor, hessian: Tensor | None, rank: int
) -> tuple[Tensor, Tensor]:
    """Return ``A [R, r]`` with orthonormal columns and ``B [r, C]``."""
    if hessian is None:
        return _leading(error, rank)
    lower = _root(hessian)
    left, right = _leading(error @ lower, rank)
    return left, torch.linalg.solve_triangular(lower, right, upper=False, left=False)


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading singular directions: orthonormal ``[R, r]``, and ``[r, C]``.

    Subspace iteration on twice the wanted rank; exact where that is the full rank.
    """
    width = min(*matrix.shape, 2 * rank + 8)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_SWEEPS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    small = basis.T @ matrix
    left, values, right = torch.linalg.svd(small, full_matrices=False)
    return basis @ left[:, :rank], values[:rank, None] * right[:rank]


def _in_8_bits(
    left: Tensor, right: Tensor, error: Tensor, hessian: Tensor | None
) -> LowRank:
    """Round the factors; the left one is refitted to the rounded right one."""
    # The product does not change with the balance, but float16 scales want no extremes.
    share = (left.abs().amax(0) / right.abs().amax(1).clamp(min=1e-30)).sqrt()
    codes, scale = _codes(right * share[:, None], 1)
    rounded = codes.float() * scale.float()
    weighted = rounded if hessian is None else rounded @ hessian
    gram = weighted @ rounded.T
    # Rows of B that became zero, or equal, leave the least norm solution.
    refitted = error @ weighted.T @ torch.linalg.pinv(gram, hermitian=True)
    left_codes, left_scale = _codes(refitted, 0)
    return LowRank(left_codes, left_scale, codes, scale)


def _codes(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return int8 codes and float16 scales, one for each slice across ``dim``."""
    scale = (values.abs().amax(dim, keepdim=True) / _MOST_CODE).half()
    safe = torch.where(scale == 0, 1.0, scale.float())
    codes = (values / safe).round().clamp(-_MOST_CODE, _MOST_CODE).to(torch.int8)
    return codes.contiguous(), scale.contiguous()
