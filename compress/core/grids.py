"""Integer grids: where scales come from, and codes from scales.

Every function works on weights seen as groups, ``[R, G, g]``: ``g`` columns share a
scale. Scales and float minima are rounded to their storage type *before* codes are
computed, so that dequantizing gives exactly what the loader of a file will see.

Source: Frantar et al. (2022), "GPTQ", for the error-driven choice of scales (there with
exponent 2.4 and no weights). Differs: squared error, weighted by the second moment of
the input channel, and both signs of the scale are tried on symmetric grids, since they
have one more negative code than positive ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core.errors import SchemeError
from compress.core.scheme import Scheme, Zero
from compress.core.tensors import TORCH_DTYPES, QuantizedTensor, decode

# Rows are searched in runs of about this many weights, which bounds the memory; on a
# CPU they fit the cache, which makes the search 1.7 times as fast.
_CHUNK_WEIGHTS = {"cpu": 1 << 18}
_CHUNK_WEIGHTS_ELSEWHERE = 1 << 24

SEARCH_FACTORS = tuple(0.55 + 0.025 * i for i in range(25))


@dataclass(frozen=True)
class GridParameters:
    """Scale and zero point of each group.

    Attributes:
        scale: float32 ``[R, G]``, holding values of the storage type.
        zero: As ``scale``; ``None`` on a symmetric grid.
    """

    scale: Tensor
    zero: Tensor | None


def as_groups(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return ``[R, C]`` as float32 ``[R, G, g]``; ``g`` columns share a scale."""
    rows, columns = weight.shape
    size = scheme.group_of(columns)
    return weight.float().view(rows, columns // size, size)


def round_to_storage(values: Tensor, scheme: Scheme) -> Tensor:
    """Round float32 values to the type that scales are stored in."""
    return values.to(TORCH_DTYPES[scheme.scale_dtype]).float()


def range_parameters(
    groups: Tensor, scheme: Scheme, factor: float = 1.0
) -> GridParameters:
    """Return the parameters that map each group's range, times ``factor``, to the grid.

    Symmetric grids use ``amax / ((2**bits - 1) / 2)``, the compressed-tensors
    convention, which clips the largest value by up to half a step. The other grids span
    ``[min(0, min), max(0, max)]``.

    Args:
        groups: float32 ``[R, G, g]``.
        scheme: The grid.
        factor: Shrinks (below 1) or widens the range; negative turns its sign, which
            only symmetric grids can.
    """
    levels = (1 << scheme.bits) - 1
    if scheme.zero is Zero.NONE:
        scale = groups.abs().amax(-1) * (factor * 2 / levels)
        return GridParameters(_usable(scale, scheme), None)
    low = groups.amin(-1).clamp(max=0) * factor
    high = groups.amax(-1).clamp(min=0) * factor
    scale = _usable((high - low) / levels, scheme)
    if scheme.zero is Zero.OFFSET:
        return GridParameters(scale, round_to_storage(low, scheme))
    zero = torch.round(-low / scale) + scheme.lowest
    return GridParameters(scale, zero.clamp(scheme.lowest, scheme.highest))


def _usable(scale: Tensor, scheme: Scheme) -> Tensor:
    """Round to storage; groups of zeros (or below the type's reach) get scale 1."""
    stored = round_to_storage(scale, scheme)
    return torch.where(stored == 0, torch.ones_like(stored), stored)


def encode(groups: Tensor, parameters: GridParameters, scheme: Scheme) -> Tensor:
    """Return the nearest codes as whole float32 values, shaped as ``groups``.

    Ties go to the even code, as ``torch.round`` and compressed-tensors do.
    """
    scale = parameters.scale.unsqueeze(-1)
    if parameters.zero is None:
        codes = groups / scale
    elif scheme.zero is Zero.INTEGER:
        codes = groups / scale + parameters.zero.unsqueeze(-1)
    else:
        codes = (groups - parameters.zero.unsqueeze(-1)) / scale
    return codes.round_().clamp_(scheme.lowest, scheme.highest)


def decode_groups(codes: Tensor, parameters: GridParameters, scheme: Scheme) -> Tensor:
    """Return the values of codes, shaped as ``codes``."""
    zero = parameters.zero
    return decode(
        codes,
        parameters.scale.unsqueeze(-1),
        None if zero is None else zero.unsqueeze(-1),
        scheme.zero,
    )


def search_parameters(
    groups: Tensor,
    scheme: Scheme,
    *,
    importance: Tensor | None = None,
    factors: Sequence[float] = SEARCH_FACTORS,
) -> GridParameters:
    """Return, for each group, the parameters of least weighted squared error.

    Args:
        groups: float32 ``[R, G, g]``.
        scheme: The grid.
        importance: float32 ``[G, g]`` weight of each column, normally the diagonal of
            the Hessian; ``None`` weighs all columns alike.
        factors: Multiples of the full range to try. Symmetric grids also try their
            negatives.
    """
    if scheme.zero is Zero.NONE:
        factors = [*factors, *(-factor for factor in factors)]
    most = _CHUNK_WEIGHTS.get(groups.device.type, _CHUNK_WEIGHTS_ELSEWHERE)
    rows = max(1, most // max(1, groups[0].numel()))
    parts = [
        _search_rows(chunk, scheme, importance, factors)
        for chunk in torch.split(groups, rows)
    ]
    zeros = [part.zero for part in parts if part.zero is not None]
    return GridParameters(
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
    )


def _search_rows(
    groups: Tensor,
    scheme: Scheme,
    importance: Tensor | None,
    factors: Sequence[float],
) -> GridParameters:
    best = range_parameters(groups, scheme)
    least = _error(groups, best, scheme, importance)
    for factor in factors:
        candidate = range_parameters(groups, scheme, factor)
        error = _error(groups, candidate, scheme, importance)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, candidate.scale, best.scale)
        zero = best.zero
        if zero is not None and candidate.zero is not None:
            zero = torch.where(better, candidate.zero, zero)
        best = GridParameters(scale, zero)
    return best


def _error(
    groups: Tensor,
    parameters: GridParameters,
    scheme: Scheme,
    importance: Tensor | None,
) -> Tensor:
    codes = encode(groups, parameters, scheme)
    error = decode_groups(codes, parameters, scheme).sub_(groups).square_()
    return (error if importance is None else error.mul_(importance)).sum(-1)


def assemble(
    codes: Tensor,
    parameters: GridParameters,
    scheme: Scheme,
    *,
    notes: tuple[str, ...] = (),
) -> QuantizedTensor:
    """Return the stored form of whole-number codes ``[R, C]`` and their parameters.

    Raises:
        SchemeError: A scale is not finite in its storage type.
    """
    dtype = TORCH_DTYPES[scheme.scale_dtype]
    zero = parameters.zero
    stored_zero = None
    if zero is not None:
        stored_zero = zero.to(torch.int8 if scheme.zero is Zero.INTEGER else dtype)
    scale = parameters.scale.to(dtype)
    if not bool(torch.isfinite(scale).all()):
        raise SchemeError(
            f"scales overflow {scheme.scale_dtype}: the weights reach "
            f"{float(parameters.scale.abs().max()):.3g} steps; "
            "set quantize.scale_dtype: bfloat16 or float32"
        )
    return QuantizedTensor(
        codes.to(torch.int8).contiguous(),
        scale.contiguous(),
        stored_zero,
        scheme,
        notes,
    )
