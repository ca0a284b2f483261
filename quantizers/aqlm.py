"""AQLM: runs of columns as sums of table entries, calibrated on the layer's inputs.

A run of ``g`` columns of row ``o`` is ``s_o sum_m C[m, code]``, with ``M`` tables of
``2^B`` entries for a matrix and a scale a row. Minimises ``tr((W - Q) H (W - Q)^T)``
with ``H = 2 sum x x^T``, see ``core/additive/solve.py``:

1. tables by residual k-means on rows divided by their norm, weighted by ``diag(H)``;
2. in rounds, codes by error feedback and by beam search in H's metric, then tables by
   least squares and scales in closed form, until a round gains little.

Source: Egiazarian et al. (2024), "Extreme Compression of Large Language Models via
Additive Quantization", arXiv 2401.06118, algorithm 1; weights and feedback between runs
as in Liu et al. (2024), "VPTQ", arXiv 2409.17066. Differs: each round searches codes
from error feedback too, not only from the codes before; tables are solved by conjugate
gradients and not stepped by Adam; H is shrunk and damped, and weights are corrected for
drift, as in ``gptq``; tables and scales are rounded to storage before the last search.

Measured on layer 10 of SmolLM2-135M, 2x8g8, loss relative to ``tr(W H W^T)``: up_proj
.061 after five rounds of coordinate descent alone, .056 with feedback, .052 with a beam
of 4; down_proj .039 with a beam of 1, .035 of 4, .034 of 8 at 4 times the time.

Limits: a matrix has tables of its own, so that small ones cannot have large tables;
such schemes are refused. Layers that read one input are coded apart. Time grows as
``R C (C + M 2^B beam)``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.core import codebooks, second_moments, table_sizes
from compress.core.additive.solve import Effort, Sums, columns_of, run_order, solve
from compress.core.continuous import BlockTuning
from compress.core.contracts import Options, Quantizer
from compress.core.scales import TORCH_DTYPES
from compress.core.scheme import WHOLE, Codebook, Scheme
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor

_BEAM = 4  # of several tables; with one, more than 1 gains less than 1%
_DIAGONAL = "H's diagonal only: it cannot be factored even with damp 1"


class AQLMOptions(Options):
    """Options of ``aqlm``.

    Attributes:
        damp: Added to the diagonal of H, as a share of its mean. Multiplied by ten, up
            to 1, while H is not positive definite; then only its diagonal counts.
        shrink: Share by which the off-diagonal of H is reduced.
        drift: Share of the correction towards the dense model's outputs that is added.
        beam: Candidates of a row while codes are searched; by default 1 with one table
            and 4 with more.
        rounds: Of codes, tables and scales, at most.
        tolerance: A round that gains a smaller share of the loss is the last one.
        steps: Of conjugate gradients for the tables of a round.
        tune: Epochs for which tables and scales of all layers of a block are trained
            towards the dense block's output; 0 is none.
        tune_rate: Learning rate of that, as a share of each tensor's size.
        seed: Of what k-means draws and of the order in which codes are visited.
        allow_large_tables: Make schemes whose tables outweigh what they save.
    """

    damp: float = Field(default=0.01, gt=0, le=second_moments.LARGEST_DAMP)
    shrink: float = Field(default=0.1, ge=0, lt=1)
    drift: float = Field(default=0.5, ge=0, le=1)
    beam: int | None = Field(default=None, ge=1, le=64)
    rounds: int = Field(default=8, ge=1, le=100)
    tolerance: float = Field(default=0.005, ge=0, lt=1)
    steps: int = Field(default=10, ge=1, le=1000)
    tune: int = Field(default=0, ge=0, le=1000)
    tune_rate: float = Field(default=1e-3, gt=0, lt=1)
    seed: int = Field(default=0, ge=0)
    allow_large_tables: bool = False


class AQLM(Quantizer):
    """Sums of table entries under a scale a row, with statistics from calibration."""

    name = "aqlm"
    summary = "additive codebooks: 1 to 3 bits, runs of columns as sums of entries"
    source = "Egiazarian et al. 2024 (arXiv 2401.06118); Liu et al. 2024 (VPTQ)"
    Options: ClassVar[type[Options]] = AQLMOptions
    options: AQLMOptions
    needs_statistics = True

    @property
    def needs_drift(self) -> bool:
        """Whether the drift correction is on."""
        return self.options.drift > 0

    @property
    def block_tuning(self) -> BlockTuning | None:
        """How a block is tuned, if the option says so."""
        options = self.options
        if not options.tune:
            return None
        return BlockTuning(options.tune, options.tune_rate, seed=options.seed)

    def schemes(self) -> tuple[str, ...]:
        """Names of schemes an allocator may choose, most bits first."""
        return (
            "aqlm-3x8g8",
            "aqlm-2x8g8",
            "aqlm-1x8g4",
            "aqlm-1x16g8",
            "aqlm-1x12g8",
            "aqlm-1x8g8",
        )

    def supports(self, scheme: Scheme) -> bool:
        """Whether this quantizer can produce ``scheme``: tables for the matrix."""
        book = scheme.codebook
        if book is None or scheme.rank or scheme.row_block != WHOLE:
            return False
        wide = book.count > 1 or book.vector > 1
        return book.scaled and wide and not book.positional

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
        assert statistics is not None, "aqlm declares needs_statistics"
        options, book = self.options, _book(scheme)
        hessian = second_moments.regularized(statistics.hessian, options.shrink)
        size = hessian.diagonal().mean()
        hessian /= size
        target = weight.float().clone()
        target[:, statistics.hessian.diagonal() == 0] = 0  # never fed: cannot matter
        runs = run_order(statistics.hessian, book.vector)
        order = columns_of(runs, book.vector)
        factor, notes = second_moments.damp_(hessian, order, options.damp)
        if factor is None:
            hessian = torch.diag(hessian.diagonal().clamp(min=options.damp))
            factor = torch.diag(hessian.diagonal()[order].rsqrt())
            notes = (_DIAGONAL,)
        elif statistics.drift is not None and options.drift:
            drift = options.drift / size * statistics.drift
            second_moments.add_drift_(target, drift, factor, order)
        found = solve(
            target,
            hessian,
            factor,
            runs,
            shape=(book.count, 1 << scheme.bits, book.vector),
            dtype=TORCH_DTYPES[scheme.scale_dtype],
            effort=self._effort(book),
        )
        return as_tensor(found, scheme, notes)

    def _effort(self, book: Codebook) -> Effort:
        options = self.options
        beam = options.beam or (1 if book.count == 1 else _BEAM)
        return Effort(
            beam, options.rounds, options.tolerance, options.steps, options.seed
        )


def as_tensor(
    found: Sums, scheme: Scheme, notes: tuple[str, ...] = ()
) -> QuantizedTensor:
    """Return sums as they are stored; tables and scales are rounded to the scheme's.

    Args:
        found: Codes of ``[R, C]``.
        scheme: Names the storage type.
        notes: For the report.
    """
    dtype = TORCH_DTYPES[scheme.scale_dtype]
    return QuantizedTensor(
        codebooks.to_stored(found.codes.flatten(1), scheme.bits),
        found.scales.to(dtype).unsqueeze(1),
        None,
        scheme,
        notes,
        tables=found.tables.to(dtype).unsqueeze(0),
    )


def _book(scheme: Scheme) -> Codebook:
    assert scheme.codebook is not None, "supports() asks for tables"
    return scheme.codebook
