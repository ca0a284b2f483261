"""AWQ's second half: clip each group where its output error is least, then round.

With ``H`` the second moment of a layer's inputs and ``H_g`` its block at a group, the
scale of the group is the multiple of its full range that minimises

    (w - q) H_g (w - q)^T

and codes are the nearest to it. The first half, channel scales that are folded into the
layer before, is the transform ``awq``, which this method brings along.

Source: Lin et al. (2023), "AWQ: Activation-aware Weight Quantization for LLM
Compression and Acceleration", arXiv 2306.00978, and its ``auto_clip``. Differs:

* the error is in closed form over all calibration tokens, not over 512 of them;
* candidates are those of every search here (``core/grids.py``): 0.55 to 1.15 of the
  range, in both signs, not 0.5 to 1;
* the off-diagonal of ``H_g`` is shrunk, against fitting the calibration text;
* q and k are clipped too, where the paper leaves them out: a layer's role is unknown
  here. ``overrides: {"re:.*[qk]_proj": {method: rtn}}`` is the paper's rule.

Limits: in groups wider than 512 columns the diagonal stands for ``H_g``, whose product
would cost more than error feedback. There is none of that; ``method: gptq`` with
``transforms: [awq]`` has both.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.core import grids, low_rank
from compress.core.contracts import Options, Quantizer
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor

_WIDEST_BLOCK = 512


class AWQOptions(Options):
    """Options of ``awq``.

    Attributes:
        shrink: Share by which the off-diagonal of H is reduced.
    """

    shrink: float = Field(default=0.1, ge=0, lt=1)


class AWQ(Quantizer):
    """Activation-aware clipping and rounding on any grid, with statistics."""

    name = "awq"
    summary = "activation-aware channel scales and clipping"
    source = "Lin et al. 2023 (arXiv 2306.00978)"
    Options: ClassVar[type[Options]] = AWQOptions
    options: AWQOptions
    needs_statistics = True
    transforms: ClassVar[tuple[str, ...]] = ("awq",)

    def schemes(self) -> tuple[str, ...]:
        """Names of schemes an allocator may choose, most bits first."""
        return tuple(f"int{bits}-g32" for bits in range(8, 1, -1))

    def supports(self, scheme: Scheme) -> bool:
        """Whether this quantizer can produce ``scheme``: any on a grid."""
        return scheme.codebook is None

    def codes_rows_apart(self, scheme: Scheme) -> bool:
        """Whether a row's codes are the same whatever rows lie beside it."""
        return scheme.rows_are_independent

    def quantize(
        self, weight: Tensor, scheme: Scheme, statistics: LayerStatistics | None
    ) -> QuantizedTensor:
        """Return the nearest codes of ``weight`` ``[R, C]`` after the clip search."""
        assert statistics is not None, "awq declares needs_statistics"
        groups = grids.as_groups(weight, scheme)
        blocks = group_blocks(statistics.hessian, groups.shape[1], self.options.shrink)
        parameters = grids.search_parameters(groups, scheme, importance=blocks)
        levels = grids.encode(groups, parameters, scheme)
        coded = grids.assemble(levels.view(weight.shape), parameters, scheme)
        if not scheme.rank:
            return coded
        shrunk = _shrunk(statistics.hessian, self.options.shrink)
        return low_rank.correct(weight, coded, hessian=shrunk)


def _shrunk(hessian: Tensor, shrink: float) -> Tensor:
    """Return H, or its blocks, with the off-diagonal reduced."""
    result = hessian * (1 - shrink)
    result.diagonal(dim1=-2, dim2=-1).copy_(hessian.diagonal(dim1=-2, dim2=-1))
    return result


def group_blocks(hessian: Tensor, count: int, shrink: float) -> Tensor:
    """Return the blocks ``[G, g, g]`` on the diagonal of H, off-diagonal shrunk.

    Of wide groups only the diagonal, ``[G, g]``.
    """
    size = hessian.shape[0] // count
    if size > _WIDEST_BLOCK:
        return hessian.diagonal().view(count, size)
    index = torch.arange(count, device=hessian.device)
    blocks = hessian.view(count, size, count, size)[index, :, index]
    return _shrunk(blocks, shrink)
