"""Scales and codes: where scales come from, and levels from scales.

Every function works on weights seen as groups, ``[R, G, g]``: ``g`` columns share a
scale. Scales and float minima are rounded to their storage type *before* levels are
computed, so that dequantizing gives exactly what the loader of a file will see. Levels
are the numbers of the scheme's grid, as float32; for integers they are the codes.

Source: Frantar et al. (2022), "GPTQ", for the error-driven choice of scales (there with
exponent 2.4 and no weights). Differs: squared error, weighted by the second moment of
the input channel, and both signs of the scale are tried on symmetric integer grids,
since they have one more negative code than positive ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core import block_encoders, scales, super_scales
from compress.core.errors import SchemeError
from compress.core.scheme import Scales, Scheme, Zero
from compress.core.tensors import LowRank, QuantizedTensor, decode

# Rows are searched in runs of about this many weights, which bounds the memory; on a
# CPU they fit the cache, which makes the search 1.7 times as fast.
_CHUNK_WEIGHTS = {"cpu": 1 << 17}
_CHUNK_WEIGHTS_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class GridParameters:
    """Scale and zero point of each group.

    Attributes:
        scale: float32 ``[R, G]``, holding numbers that can be stored.
        zero: As ``scale``; ``None`` on a symmetric grid.
        outer: float32 ``[R, 1]``, ``[1, 1]`` or a few numbers a row that scales have in
            common, if they do; see ``core/scales.py`` and ``core/super_scales.py``.
    """

    scale: Tensor
    zero: Tensor | None = None
    outer: Tensor | None = None


def as_groups(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return ``[R, C]`` as float32 ``[R, G, g]``; ``g`` columns share a scale."""
    rows, columns = weight.shape
    size = scheme.group_of(columns)
    return weight.float().view(rows, columns // size, size)


def round_to_storage(
    values: Tensor, scheme: Scheme, outer: Tensor | None = None
) -> Tensor:
    """Round float32 scales to numbers that can be stored (``core/scales.py``)."""
    return scales.round_to_storage(values, scheme, outer)


def range_parameters(
    groups: Tensor,
    scheme: Scheme,
    factor: float = 1.0,
    *,
    outer: Tensor | None = None,
    rounding: str | None = None,
) -> GridParameters:
    """Return the parameters that map each group's range, times ``factor``, to the grid.

    Symmetric integers use ``amax / ((2**bits - 1) / 2)``, the compressed-tensors
    convention, which clips the largest value by up to half a step; floats map the
    largest magnitude to their largest number. The other grids span
    ``[min(0, min), max(0, max)]``.

    Args:
        groups: float32 ``[R, G, g]``.
        scheme: The grid.
        factor: Shrinks (below 1) or widens the range; negative turns its sign, which
            only symmetric integers with free scales can.
        outer: What scales have in common, if it is settled already.
        rounding: Of exponents, see ``core/scales.py``; ``None`` is that of microscaling
            formats for scales that are powers of two, and the nearest for ratios.
    """
    return _range_of(_extent(groups, scheme), scheme, factor, outer, rounding)


def _extent(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return lower and upper end of each group's range, ``[R, G]``."""
    if scheme.zero is Zero.NONE:
        largest = _shared(groups.abs().amax(-1), scheme)
        return -largest, largest
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def _range_of(
    extent: tuple[Tensor, Tensor],
    scheme: Scheme,
    factor: float,
    outer: Tensor | None,
    rounding: str | None,
) -> GridParameters:
    low, high = extent
    if scheme.scales is Scales.SUPER:
        if scheme.zero is Zero.NONE:
            wanted = _divided(high, scheme.levels.reach) * factor
            return super_parameters(wanted, None, scheme)
        wanted = _divided((high - low) * factor, (1 << scheme.bits) - 1)
        return super_parameters(wanted, low * factor, scheme)
    if scheme.zero is Zero.NONE:
        if outer is None:
            outer = scales.outer_scale(high, scheme)
        if scheme.scales is Scales.POWER and rounding is None:
            wanted = scales.microscaling(high, scheme) * factor
        else:
            wanted = _divided(high, scheme.levels.reach) * factor
        stored = scales.round_to_storage(
            wanted, scheme, outer, rounding=rounding or "nearest"
        )
        return GridParameters(_usable(stored, scheme, outer), None, outer)
    low, high = low * factor, high * factor
    wanted = _divided(high - low, (1 << scheme.bits) - 1)
    scale = _usable(round_to_storage(wanted, scheme), scheme, None)
    if scheme.zero is Zero.OFFSET:
        return GridParameters(scale, round_to_storage(low, scheme))
    zero = torch.round(-low / scale) + scheme.lowest
    return GridParameters(scale, zero.clamp(scheme.lowest, scheme.highest))


def _divided(values: Tensor, by: float) -> Tensor:
    """Divide exactly: by a Python number a GPU multiplies with a rounded inverse."""
    return values / values.new_tensor(by)


def super_parameters(
    scale: Tensor,
    zero: Tensor | None,
    scheme: Scheme,
    outer: Tensor | None = None,
) -> GridParameters:
    """Return wanted scales and minima as they can be stored with ``SUPER`` scales.

    Args:
        scale: float32 ``[R, G]``.
        zero: float32 ``[R, G]``, 0 or less, or ``None``.
        scheme: Has ``SUPER`` scales.
        outer: What they have in common; fitted to the largest if not given.
    """
    if outer is None:
        outer = super_scales.fitted(scale, zero, scheme)
    stored = round_to_storage(scale, scheme, outer)
    _, step = super_scales.parts_of(outer, scheme)
    if step is not None:
        assert zero is not None
        codes = super_scales.codes_of(-zero, step, scheme)
        zero = -codes * super_scales.spread(step, scheme)
    return GridParameters(_usable(stored, scheme, outer), zero, outer)


def _shared(values: Tensor, scheme: Scheme) -> Tensor:
    """Return the largest value of each block of rows, for each row; ``[R, G]``."""
    rows = values.shape[0]
    block = scheme.rows_of_scale(rows)
    if block == 1:
        return values
    parts = torch.split(values, block)
    return torch.cat([part.amax(0, keepdim=True).expand_as(part) for part in parts])


def _usable(stored: Tensor, scheme: Scheme, outer: Tensor | None) -> Tensor:
    """Give a scale to groups of zeros, and to those below the storage type's reach."""
    least = scales.smallest_scale(scheme, outer)
    return torch.where(stored == 0, least, stored)


def encode(groups: Tensor, parameters: GridParameters, scheme: Scheme) -> Tensor:
    """Return the nearest levels as float32, shaped as ``groups``.

    Ties go to the even code, as ``torch.round`` and compressed-tensors do.
    """
    zero = parameters.zero
    return to_levels(
        groups,
        parameters.scale.unsqueeze(-1),
        None if zero is None else zero.unsqueeze(-1),
        scheme,
    )


def to_levels(
    values: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme
) -> Tensor:
    """Return the nearest levels of ``values``; scale and zero broadcast against it."""
    return scheme.levels.round_(_to_steps(values, scale, zero, scheme))


def _to_steps(
    values: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme
) -> Tensor:
    """Return where on the grid ``values`` lie, before they are rounded to it."""
    if zero is None:
        return values / scale
    if scheme.zero is Zero.INTEGER:
        return values / scale + zero
    return (values - zero) / scale


def decode_groups(levels: Tensor, parameters: GridParameters, scheme: Scheme) -> Tensor:
    """Return the values of levels, shaped as ``levels``."""
    zero = parameters.zero
    return decode(
        levels,
        parameters.scale.unsqueeze(-1),
        None if zero is None else zero.unsqueeze(-1),
        scheme.zero,
    )


def search_parameters(
    groups: Tensor,
    scheme: Scheme,
    *,
    importance: Tensor | None = None,
    factors: Sequence[float] | None = None,
    outer: Tensor | None = None,
    by_magnitude: bool = False,
) -> GridParameters:
    """Return, for each group, the parameters of least weighted squared error.

    On ggml's K and IQ4 types they come from ggml's searches (``core/block_encoders``).

    Args:
        groups: float32 ``[R, G, g]``.
        scheme: The grid.
        importance: float32 ``[G, g]`` weight of each column, normally the diagonal of
            the Hessian, or ``[G, g, g]``, its blocks; ``None`` weighs all alike.
        factors: Multiples of the full range to try; those of the scheme by default.
        outer: What scales have in common, if it is settled already.
        by_magnitude: On ggml's types, whether large weights count more than
            ``importance`` says, as in llama.cpp.
    """
    most = _CHUNK_WEIGHTS.get(groups.device.type, _CHUNK_WEIGHTS_ELSEWHERE)
    rows = max(1, most // max(1, groups[0].numel()))
    if block_encoders.treats(scheme):
        parts = [
            _block_parameters(run, scheme, importance, by_magnitude)
            for run in torch.split(groups, rows)
        ]
        return joined(parts)
    if factors is None:
        factors = scales.search_factors(scheme)
    outers: Sequence[Tensor | None] = (outer,)
    if outer is None:
        outer = range_parameters(groups, scheme).outer
        outers = scales.outer_candidates(outer, scheme)
    if scheme.row_block != 1:  # rows that share scales are searched together
        rows = groups.shape[0]
    loss, parts = _Loss(scheme, importance), []
    for start in range(0, groups.shape[0], rows):
        run = slice(start, start + rows)
        shared = [o if o is None or len(o) == 1 else o[run] for o in outers]
        parts.append(_search_rows(groups[run], loss, factors, shared))
    found = joined(parts)
    is_own = scheme.scales is Scales.RATIO
    return found if is_own else GridParameters(found.scale, found.zero, outer)


def _block_parameters(
    groups: Tensor, scheme: Scheme, importance: Tensor | None, by_magnitude: bool
) -> GridParameters:
    found = block_encoders.search(groups, scheme, importance, by_magnitude=by_magnitude)
    if found.outer is None:
        return GridParameters(_usable(found.scale, scheme, None))
    return super_parameters(found.scale, found.minimum, scheme, found.outer)


def joined(parts: Sequence[GridParameters]) -> GridParameters:
    """Return the parameters of runs of rows as those of all rows."""
    zeros = [part.zero for part in parts if part.zero is not None]
    outers = [part.outer for part in parts if part.outer is not None]
    return GridParameters(
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
        torch.cat(outers) if outers else None,
    )


@dataclass(frozen=True)
class _Loss:
    """What a search minimises, for the groups of one scheme."""

    scheme: Scheme
    importance: Tensor | None

    def of(self, groups: Tensor, parameters: GridParameters) -> Tensor:
        """Return ``[R, G]``, the same for rows that share a scale."""
        zero = parameters.zero
        steps = _to_steps(
            groups,
            parameters.scale.unsqueeze(-1),
            None if zero is None else zero.unsqueeze(-1),
            self.scheme,
        )
        # Errors in steps of the grid: a pass over the weights less than in their units.
        error = self.scheme.levels.round_(steps.clone()).sub_(steps)
        loss = _squared(error, self.importance) * parameters.scale.square()
        block = self.scheme.rows_of_scale(loss.shape[0])
        if block == 1:
            return loss
        parts = torch.split(loss, block)
        return torch.cat([part.sum(0, keepdim=True).expand_as(part) for part in parts])


def _search_rows(
    groups: Tensor,
    loss: _Loss,
    factors: Sequence[float],
    outers: Sequence[Tensor | None],
) -> GridParameters:
    best, least = _search_groups(groups, loss, factors, outers[0])
    for outer in outers[1:]:
        found, lost = _search_groups(groups, loss, factors, outer)
        better = lost.sum(1, keepdim=True) < least.sum(1, keepdim=True)
        least = torch.where(better, lost, least)
        assert found.outer is not None and best.outer is not None
        best = GridParameters(
            torch.where(better, found.scale, best.scale),
            None,
            torch.where(better, found.outer, best.outer),
        )
    return best


def _search_groups(
    groups: Tensor, loss: _Loss, factors: Sequence[float], outer: Tensor | None
) -> tuple[GridParameters, Tensor]:
    """Return the best parameters of each group, and their losses ``[R, G]``."""
    candidates = _candidates(groups, loss, factors, outer)
    best = next(candidates)
    least = loss.of(groups, best)
    for candidate in candidates:
        lost = loss.of(groups, candidate)
        better = lost < least
        least = torch.where(better, lost, least)
        scale, zero = torch.where(better, candidate.scale, best.scale), best.zero
        if zero is not None and candidate.zero is not None:
            zero = torch.where(better, candidate.zero, zero)
        best = GridParameters(scale, zero, outer)
    return best, least


def _candidates(
    groups: Tensor, loss: _Loss, factors: Sequence[float], outer: Tensor | None
) -> Iterator[GridParameters]:
    """Yield the full range, multiples of it and, with float minima, ggml's fit."""
    scheme, extent = loss.scheme, _extent(groups, loss.scheme)
    for factor in (1.0, *factors):
        yield _range_of(extent, scheme, factor, outer, None)
    if scheme.zero is Zero.OFFSET:
        scale, low = block_encoders.fitted_range(groups, scheme, loss.importance)
        stored = _usable(round_to_storage(scale, scheme), scheme, None)
        yield GridParameters(stored, round_to_storage(low, scheme))


def _squared(error: Tensor, importance: Tensor | None) -> Tensor:
    """Return the squared size ``[R, G]`` of errors ``[R, G, g]``, which are lost."""
    if importance is None or importance.dim() == 2:
        weighted = error if importance is None else error.mul_(importance.sqrt())
        size: Tensor = torch.linalg.vector_norm(weighted, dim=-1)
        return size.square_()
    moved = (error.transpose(0, 1) @ importance).transpose(0, 1)
    return moved.mul_(error).sum(-1)


def assemble(
    levels: Tensor,
    parameters: GridParameters,
    scheme: Scheme,
    *,
    notes: tuple[str, ...] = (),
    low_rank: LowRank | None = None,
) -> QuantizedTensor:
    """Return the stored form of levels ``[R, C]`` and their parameters.

    Raises:
        SchemeError: A scale is not finite in its storage type.
    """
    if not bool(torch.isfinite(parameters.scale).all()):
        raise SchemeError(
            f"scales overflow {scheme.scale_dtype}: they must be finite; "
            "set quantize.scale_dtype: bfloat16 or float32"
        )
    scale, outer = scales.to_stored(parameters.scale, scheme, parameters.outer)
    zero = scales.zeros_to_stored(parameters.zero, scheme, parameters.outer)
    zero = None if zero is None else zero.contiguous()
    codes = scheme.levels.to_codes(levels).contiguous()
    return QuantizedTensor(codes, scale, zero, scheme, notes, outer, low_rank)
