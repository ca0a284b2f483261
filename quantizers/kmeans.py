"""K-means palettes: tables of free values, fitted to weights and to a layer's inputs.

Runs of ``g`` columns of a row become places in a table of its block of rows:
``palette3`` has 8 values for each 16 rows, ``palette-2x6`` 64 pairs for a matrix.

    tables = argmin sum_i f_i (w_i - t_code(i))^2          weighted k-means
    codes  = argmin tr((W - Q) H (W - Q)^T)                error feedback, tables fixed
    tables = argmin of the same for these codes            least squares
    codes  <- one pass of coordinate descent

The last two are done ``rounds`` times.

Tables are rounded to what is stored before codes are chosen, and numbers ascend. A
row keeps the nearest entries where feedback loses more, and a table its old entries
where refitting does, so the objective never rises. Numbers start from an optimum over
bins (``core/clustering.py``), vectors from k-means++ (``core/vector_clustering.py``).

Source: Kim et al. (2023), "SqueezeLLM", arXiv 2306.07629, for k-means by sensitivity;
Frantar et al. (2022), "GPTQ", and van Baalen et al. (2024), "GPTVQ", arXiv 2402.15319,
for feedback on tables. Differs from SqueezeLLM:

* ``f`` is not the Fisher information of each weight, which takes a backward pass, but
  that of its column: ``1 / U_jj^2`` with ``H^-1 = U^T U``, what rounding column ``j``
  costs once others have made up for it, or ``H_jj`` without feedback. On layers of
  SmolLM2-135M Fisher weights gave 2 to 11% more error than these with feedback;
* no weights are kept apart as outliers;
* ``-scaled`` schemes divide rows by their weighted root mean square first.

Limits: the tables of one block of rows see columns of all scales, so that a table for
many rows needs rows that are alike. One table for a whole matrix is fitted to bins of
1/65,536 of its range. Memory is a few copies of the matrix and a few ``[C, C]``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.core import clustering, contracts, palettes, second_moments
from compress.core.codebooks import to_stored
from compress.core.contracts import Options, Quantizer
from compress.core.scheme import WHOLE, Scheme
from compress.core.statistics import LayerStatistics
from compress.core.tables import Tables, nearest
from compress.core.tensors import TORCH_DTYPES, QuantizedTensor
from compress.core.vector_clustering import vector_centroids

_FLOOR = 1e-3  # of the mean weight is added to all, so that each column counts
_WEIGHTS_AT_ONCE = 1 << 25


class KMeansOptions(Options):
    """Options of ``kmeans``.

    Attributes:
        sensitivity: What a weight counts in k-means: ``hessian``, by the inputs of its
            column, or ``none``, all alike.
        feedback: Choose codes by error feedback instead of the nearest.
        rounds: Of refitted tables and coordinate descent after feedback.
        exact: Find the optimum of k-means on numbers instead of a close one; takes
            ``2^bits * n log n`` steps for ``n`` weights that share a table: 60 ms for
            16 rows of 576 columns and 4 bits, and not 3. The error of layers changes by
            less than a hundredth.
        damp: Added to the diagonal of H, as a share of its mean. Multiplied by ten, up
            to 1, while H is not positive definite.
        shrink: Share by which the off-diagonal of H is reduced.
        drift: Share of the correction towards the dense model's outputs that is added;
            only with feedback.
        act_order: Take columns by falling ``diag(H)`` instead of from left to right.
        seed: Of the start of k-means on vectors.
    """

    sensitivity: Literal["hessian", "none"] = "hessian"
    feedback: bool = True
    rounds: int = Field(default=2, ge=0, le=20)
    exact: bool = False
    damp: float = Field(default=0.01, gt=0, le=second_moments.LARGEST_DAMP)
    shrink: float = Field(default=0.1, ge=0, lt=1)
    drift: float = Field(default=0.5, ge=0, le=1)
    act_order: bool = True
    seed: int = Field(default=0, ge=0)


class KMeans(Quantizer):
    """Palettes by weighted k-means, with error feedback on their tables."""

    name = "kmeans"
    summary = "palettes by weighted k-means with error feedback on the tables"
    source = "Kim et al. 2023 (arXiv 2306.07629); van Baalen et al. 2024 (GPTVQ)"
    Options: ClassVar[type[Options]] = KMeansOptions
    options: KMeansOptions

    def __init__(self, options: contracts.Options | None = None) -> None:
        super().__init__(options)
        chosen = self.options
        self.needs_statistics = chosen.feedback or chosen.sensitivity != "none"

    @property
    def needs_drift(self) -> bool:
        """Whether the drift correction is on."""
        return self.options.feedback and self.options.drift > 0

    def schemes(self) -> tuple[str, ...]:
        """Names of schemes an allocator may choose, most bits first."""
        return tuple(f"palette{bits}" for bits in range(8, 1, -1))

    def supports(self, scheme: Scheme) -> bool:
        """Whether this quantizer can produce ``scheme``: any with one table a row."""
        book = scheme.codebook
        if book is None or book.positional or scheme.rank:
            return False
        return book.count == 1

    def quantize(
        self, weight: Tensor, scheme: Scheme, statistics: LayerStatistics | None
    ) -> QuantizedTensor:
        """Return codes of ``weight`` ``[R, C]``, solved in float32 on its device.

        Falls back to the nearest entries, with a note, when H cannot be factored.
        """
        assert scheme.codebook is not None, "supports() says which schemes"
        target = weight.float().clone()
        if statistics is None:
            return self._clustered(target, target.new_ones(target.shape[1]), scheme)
        options, diagonal = self.options, statistics.hessian.diagonal()
        dead = diagonal == 0
        target[:, dead] = 0  # never fed: cannot matter
        if not options.feedback:
            return self._clustered(target, self._importance(diagonal), scheme)
        hessian = second_moments.regularized(statistics.hessian, options.shrink)
        order = second_moments.column_order(
            statistics.hessian, act_order=options.act_order, run=scheme.codebook.vector
        )
        factor, notes = second_moments.damp_(hessian, order, options.damp)
        if factor is None:
            return self._clustered(target, self._importance(diagonal), scheme, notes)
        if statistics.drift is not None and options.drift:
            drift = options.drift * statistics.drift
            second_moments.add_drift_(target, drift, factor, order)
        cost = torch.empty_like(factor[0])
        cost[order] = factor.diagonal() ** -2
        importance = self._importance(cost.masked_fill_(dead, 0))
        parts = []
        for run in _row_runs(target, scheme):
            fit = _Fit(run, scheme, importance)
            fit.tables = self._tables(fit, scheme)
            fit.choose_nearest()
            fit.feed_back(hessian, factor, order)
            for _ in range(options.rounds):
                fit.refine(hessian, order)
            parts.append(fit)
        return _assembled(parts, scheme, notes)

    def takes_importance(self, scheme: Scheme) -> bool:
        """Whether :meth:`supports` says yes: k-means weighs columns by it."""
        return self.supports(scheme)

    def quantize_by_importance(
        self, weight: Tensor, scheme: Scheme, importance: Tensor
    ) -> QuantizedTensor:
        """Return the nearest entries of tables of least weighted squared error."""
        target = weight.float().clone()
        return self._clustered(target, self._importance(importance), scheme)

    def _importance(self, columns: Tensor) -> Tensor:
        """Return weights of columns ``[C]``; columns of none stay without."""
        if self.options.sensitivity == "none":
            return (columns > 0).float()
        floor = _FLOOR * columns.mean()
        return torch.where(columns > 0, columns + floor, 0.0)

    def _clustered(
        self,
        target: Tensor,
        importance: Tensor,
        scheme: Scheme,
        notes: tuple[str, ...] = (),
    ) -> QuantizedTensor:
        """Return the nearest entries of k-means."""
        parts = []
        for run in _row_runs(target, scheme):
            fit = _Fit(run, scheme, importance)
            fit.tables = self._tables(fit, scheme)
            fit.choose_nearest()
            parts.append(fit)
        return _assembled(parts, scheme, notes)

    def _tables(self, fit: _Fit, scheme: Scheme) -> Tables:
        """Return the tables of k-means, as stored."""
        assert scheme.codebook is not None
        block, count = fit.tables.block, 1 << scheme.bits
        weights = fit.importance * fit.row_weights
        if scheme.codebook.vector == 1:
            points, masses = _blocks(fit.target, block), _blocks(weights, block)
            if self.options.exact:
                found = clustering.optimal_centroids(points, masses, count)
            else:
                found = clustering.centroids(points, masses, count)
            return Tables(_as_stored(found.unsqueeze(-1), scheme), block)
        vector = scheme.codebook.vector
        pairs = zip(
            torch.split(fit.target, block), torch.split(weights, block), strict=True
        )
        tables = [
            vector_centroids(
                x.reshape(-1, vector),
                f.reshape(-1, vector),
                count,
                seed=self.options.seed,
            )[0]
            for x, f in pairs
        ]
        return Tables(_as_stored(torch.stack(tables), scheme), block)


class _Fit:
    """Rows of a matrix with their tables and codes, while these are improved.

    Args:
        target: float32 ``[R, C]``, used up.
        scheme: Of tables.
        importance: ``[C]`` of columns in k-means.

    Attributes:
        target: Divided by the scales of rows, if they have some.
        scale: ``[R, 1]`` as stored, or ``None``.
        row_weights: ``[R, 1]``, what an error of ``target`` counts.
        tables: As stored.
        codes: int64 ``[R, C / g]``.
    """

    def __init__(self, target: Tensor, scheme: Scheme, importance: Tensor) -> None:
        assert scheme.codebook is not None
        self.importance = importance
        self._scheme = scheme
        self.scale: Tensor | None = None
        self.row_weights = target.new_ones(len(target), 1)
        if scheme.codebook.scaled:
            self.scale = _row_scales(target, importance, scheme)
            target = target / self.scale.float()
            self.row_weights = self.scale.float() ** 2
        self.target = target
        block = min(scheme.rows_of_scale(len(target)), len(target))
        self.tables = Tables(target.new_empty(0, 0, scheme.codebook.vector), block)
        self.codes = torch.empty(0, dtype=torch.long)

    def choose_nearest(self) -> None:
        """Set codes to the nearest entries."""
        self.codes = nearest(self.target, self.tables, self.importance)

    def feed_back(self, hessian: Tensor, factor: Tensor, order: Tensor) -> None:
        """Choose codes by error feedback, in the rows where that loses less."""
        codes = palettes.solve(self.target, self.tables, factor, order)
        before = palettes.losses(self.target, self.tables, self.codes, hessian)
        after = palettes.losses(self.target, self.tables, codes, hessian)
        better = (after <= before).unsqueeze(1)
        self.codes = torch.where(better, codes, self.codes)

    def refine(self, hessian: Tensor, order: Tensor) -> None:
        """Refit tables and move codes; the loss of no table rises."""
        target, old, weights = self.target, self.tables, self.row_weights
        entries = palettes.refit(target, old, self.codes, hessian, weights)
        entries, codes = _sorted(_as_stored(entries, self._scheme), old, self.codes)
        new = Tables(entries, old.block)
        owner = old.owner(slice(0, len(target)))
        change = palettes.losses(target, new, codes, hessian, weights)
        change -= palettes.losses(target, old, self.codes, hessian, weights)
        total = change.new_zeros(len(entries)).index_add_(0, owner, change)
        falls = total < 0
        entries = torch.where(falls[:, None, None], entries, old.entries)
        self.tables = Tables(entries, old.block)
        self.codes = torch.where(falls[owner].unsqueeze(1), codes, self.codes)
        self.codes = palettes.descend(target, self.tables, self.codes, hessian, order)


def _row_runs(target: Tensor, scheme: Scheme) -> list[Tensor]:
    """Return runs of rows that share no table with others."""
    if scheme.row_block == WHOLE:
        return [target]
    tables = max(1, _WEIGHTS_AT_ONCE // (target.shape[1] * scheme.row_block))
    return list(torch.split(target, tables * scheme.row_block))


def _blocks(values: Tensor, block: int) -> Tensor:
    """Return ``[T, block * C]`` of ``[R, C]``, the last run filled up with zeros."""
    missing = -len(values) % block
    if missing:
        values = torch.nn.functional.pad(values, (0, 0, 0, missing))
    return values.reshape(-1, block * values.shape[1])


def _row_scales(target: Tensor, importance: Tensor, scheme: Scheme) -> Tensor:
    """Return the weighted root mean square of rows ``[R, 1]``, as stored.

    A row of zeros gets the smallest number, so that it has no say in the tables.
    """
    total = importance.sum()
    weights = torch.where(total > 0, importance, torch.ones_like(importance))
    size = (target.square() @ weights / weights.sum()).sqrt().unsqueeze(1)
    stored = _rounded(size, scheme)
    least = max(torch.finfo(stored.dtype).smallest_normal / 1024, 1e-30)
    return torch.where(stored > 0, stored, torch.full_like(stored, least))


def _rounded(values: Tensor, scheme: Scheme) -> Tensor:
    """Return values in the storage type; those beyond its range are its largest."""
    dtype = TORCH_DTYPES[scheme.scale_dtype]
    most = torch.finfo(dtype).max
    return values.clamp(-most, most).to(dtype)


def _as_stored(entries: Tensor, scheme: Scheme) -> Tensor:
    return _rounded(entries, scheme).float()


def _sorted(entries: Tensor, tables: Tables, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return tables of numbers in ascending order, and codes that follow."""
    if tables.vector > 1:
        return entries, codes
    ordered, places = entries.sort(dim=1, stable=True)
    moved = places[:, :, 0].argsort(dim=1)
    owner = tables.owner(slice(0, len(codes)))
    return ordered, moved[owner].gather(1, codes)


def _assembled(
    parts: list[_Fit], scheme: Scheme, notes: tuple[str, ...]
) -> QuantizedTensor:
    dtype = TORCH_DTYPES[scheme.scale_dtype]
    tables = torch.cat([part.tables.entries for part in parts]).to(dtype)
    scales = [part.scale for part in parts if part.scale is not None]
    scale = torch.cat(scales) if scales else tables.new_ones(1, 1)
    codes = torch.cat([to_stored(part.codes, scheme.bits) for part in parts])
    return QuantizedTensor(
        codes, scale, None, scheme, notes, tables=tables.unsqueeze(1)
    )
