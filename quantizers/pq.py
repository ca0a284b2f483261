"""Product quantization: each run of columns has tables of its own, shared by all rows.

For matrices with many more rows than columns: the vocabulary matrix. ``pq-4x8`` codes 4
columns in 8 bits, 2 bits a weight, beside 256 x C values of tables, which 49,152 tokens
share; ``pq-8x8x2`` sums two tables of 8 columns (the residual form).

    sum_v r_v (w_v - q_v) H (w_v - q_v)^T  is minimised, see ``core/product.py``

``H`` is the second moment of the head's inputs, of the gradients that reach an
embedding, or the sum of both where the matrix is tied (``calibration/ends.py``: the sum
is that of the KL, so there is no weight to choose). ``r_v`` is ``n_v + unseen`` for a
token that came ``n_v`` times in the calibration text: a KL counts a token as often as
it comes.

Measured on SmolLM2-135M, ``pq-8x8``, KL on WikiText-2 / tales / code (6 x 384 tokens),
calibrated on 32,768 tokens, in which 12% of the vocabulary came:

==================================  ====================
plain errors, all rows alike        3.66 / 4.51 / 4.84
all of H, all rows alike            3.13 / 3.68 / 3.27
sqrt(n + 1), diagonal of H          2.16 / 2.76 / 2.31
sqrt(n + 1), its blocks of 8        2.08 / 2.81 / 2.66
sqrt(n + 1), all of H               1.69 / 2.18 / 1.84
sqrt(n + 1), and ``-scaled``        1.84 / 2.32 / 1.79
n + 1, all of H                     1.14 / 1.46 / 1.13
n + 1/4, all of H                   1.05 / 1.21 / 1.02
==================================  ====================

Source: VQ-Logits, arXiv 2505.10202, for tables in the place of a vocabulary matrix;
Jegou et al. (2011), "Product quantization for nearest neighbor search". Differs:
VQ-Logits has one table of whole rows, which gives all tokens of a cluster the same
logit. That takes training; without, the model is destroyed (``benchmarks/vocabulary``).

Limits: rows of tokens that calibration never met are coded worse than with rows alike;
for text in other languages or scripts, calibrate on some of it or raise ``unseen``. A
matrix with few rows would be smaller than its tables; such layers are refused. Time
grows as ``R C (C + 2^B)``: 40 s for 49,152 x 576 on a core.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.core import codebooks, contracts, product, second_moments, table_sizes
from compress.core.contracts import Options, Quantizer
from compress.core.scales import TORCH_DTYPES
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor

_DIAGONAL = "H's diagonal only: it cannot be factored even with damp 1"


class ProductOptions(Options):
    """Options of ``pq``.

    Attributes:
        sensitivity: What an error counts: ``hessian``, by the inputs of the layer, or
            ``none``, all alike, which needs no calibration.
        unseen: What is added to a token's count in the calibration text for the weight
            of its row, and so the weight of tokens that never came. The larger, the
            more alike all rows are.
        sweeps: Of coordinate descent after error feedback.
        damp: Added to the diagonal of H, as a share of its mean. Multiplied by ten, up
            to 1, while H is not positive definite; then only its diagonal counts.
        shrink: Share by which the off-diagonal of H is reduced.
        seed: Of the start of k-means.
        allow_large_tables: Make schemes whose tables outweigh what they save.
    """

    sensitivity: Literal["hessian", "none"] = "hessian"
    unseen: float = Field(default=0.25, gt=0)
    sweeps: int = Field(default=2, ge=0, le=100)
    damp: float = Field(default=0.01, gt=0, le=second_moments.LARGEST_DAMP)
    shrink: float = Field(default=0.1, ge=0, lt=1)
    seed: int = Field(default=0, ge=0)
    allow_large_tables: bool = False


class ProductQuantizer(Quantizer):
    """Tables for each run of columns, for a vocabulary matrix above all."""

    name = "pq"
    summary = "product quantization of embedding and head: 1 to 4 bits, shared tables"
    source = "VQ-Logits (arXiv 2505.10202), made post-training; Jegou et al. 2011"
    Options: ClassVar[type[Options]] = ProductOptions
    options: ProductOptions

    def __init__(self, options: contracts.Options | None = None) -> None:
        super().__init__(options)
        self.needs_statistics = self.options.sensitivity != "none"

    def schemes(self) -> tuple[str, ...]:
        """Names of schemes an allocator may choose, most bits first."""
        return ("pq-2x8", "pq-4x8x2", "pq-4x8", "pq-8x8x2", "pq-8x8")

    def supports(self, scheme: Scheme) -> bool:
        """Whether this quantizer can produce ``scheme``: tables of runs of columns."""
        book = scheme.codebook
        return book is not None and book.positional and not scheme.rank

    def obstacle(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Return why tables are too large for a matrix, unless they are allowed."""
        if self.options.allow_large_tables:
            return None
        return table_sizes.obstacle(scheme, shape, self.schemes())

    def quantize(
        self, weight: Tensor, scheme: Scheme, statistics: LayerStatistics | None
    ) -> QuantizedTensor:
        """Return codes of ``weight`` ``[R, C]``, solved in float32 on its device.

        Only the diagonal of H counts, with a note, when it cannot be factored.
        """
        rows, columns = weight.shape
        counts = None
        hessian = torch.eye(columns, device=weight.device)
        if statistics is not None:
            hessian, counts = statistics.hessian, statistics.counts
        frequency = torch.ones(rows, device=weight.device)
        if counts is not None:
            frequency = counts.to(frequency) + self.options.unseen
        return self._solved(weight.float(), scheme, hessian, frequency)

    def _solved(
        self, target: Tensor, scheme: Scheme, hessian: Tensor, frequency: Tensor
    ) -> QuantizedTensor:
        options, book = self.options, scheme.codebook
        assert book is not None, "supports() says which schemes"
        order = second_moments.column_order(hessian, act_order=True, run=book.vector)
        hessian = second_moments.regularized(hessian, options.shrink)
        hessian /= hessian.diagonal().mean()
        factor, notes = second_moments.damp_(hessian, order, options.damp)
        if factor is None:
            hessian = torch.diag(hessian.diagonal().clamp(min=options.damp))
            factor = torch.diag(hessian.diagonal()[order].rsqrt())
            notes = (_DIAGONAL,)
        dtype = TORCH_DTYPES[scheme.scale_dtype]
        scale = torch.ones(1, 1, dtype=dtype, device=target.device)
        if book.scaled:
            scale = _row_sizes(target, dtype)
            target = target / scale.float()
            frequency = frequency * scale.float()[:, 0] ** 2
        metric = product.Metric(hessian, factor, order, frequency / frequency.mean())
        shape = (book.count, 1 << scheme.bits, book.vector)
        found = product.fed_back(
            target, metric, shape=shape, dtype=dtype, seed=options.seed
        )
        for _ in range(options.sweeps):
            product.sweep_(found, target, metric, dtype)
        codes = codebooks.to_stored(found.codes.flatten(1), scheme.bits)
        tables = found.tables.to(dtype)
        return QuantizedTensor(codes, scale, None, scheme, notes, tables=tables)


def _row_sizes(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the root mean square of rows ``[R, 1]``, as stored and above zero."""
    least = torch.finfo(dtype).smallest_normal
    sizes = target.square().mean(1, keepdim=True).sqrt()
    return sizes.clamp(least, torch.finfo(dtype).max).to(dtype)
