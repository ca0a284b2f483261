"""Codes of one part of a model (a block, or embedding and head), while they are made.

Layers that read the same input and go to the same scheme by the same method are coded
as one matrix, their rows stacked: runtimes fuse them, and some schemes have one scale
for a whole matrix, which then has to be the same for all of them. It is also cheaper:
one factor of the Hessian instead of three.

Where several processes code a part, each takes whole stacks or rows of one, and all get
the codes of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from compress.calibration import experts
from compress.core.contracts import Quantizer
from compress.core.families import Linear
from compress.core.plan import LayerPlan
from compress.core.scheme import WHOLE, Scheme
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor, join_rows
from compress.distributed.codes import packed, unpacked
from compress.distributed.dealing import coders
from compress.distributed.team import Team
from compress.progress import progress_bar
from compress.workdir import LayerRecord, WorkDir

# A GPU loops over columns, and takes about as long for fewer rows than these.
_LEAST_ROWS = 1024
_WEIGHTS_AT_ONCE = 1 << 27  # of matrices that are coded side by side
_SUMS = "sums/"  # travel beside the codes of a stack


def stacks(
    linears: Sequence[Linear], layers: Mapping[str, LayerPlan]
) -> list[list[LayerPlan]]:
    """Return the layers that are coded together, in order of execution.

    Args:
        linears: Of a block.
        layers: Their plans by path inside the block.
    """
    groups: dict[object, list[LayerPlan]] = {}
    for linear in linears:
        layer = layers[linear.path]
        alike = (linear.input, layer.method, layer.scheme)
        groups.setdefault(alike if _stacks(layer) else layer.name, []).append(layer)
    return list(groups.values())


def _stacks(layer: LayerPlan) -> bool:
    """Whether rows of other layers may lie above and below those of this one."""
    block = layer.scheme.row_block
    if block == WHOLE and layer.scheme.codebook is not None:
        return False  # tables belong to one matrix
    tiles = block == WHOLE or layer.shape[0] % block == 0
    return tiles and not layer.scheme.rank  # a correction is that of one layer


def row_sums(
    weight: Tensor, values: Tensor, statistics: LayerStatistics | None
) -> Tensor:
    """Return squared errors and energies of each row, float64 ``[4, R]``.

    They are ``E H E^T`` and ``W H W^T``, zero without statistics, and ``|E|^2`` and
    ``|W|^2``.

    Args:
        weight: float32 ``[R, C]``.
        values: What it became.
        statistics: Of its input.
    """

    def energy(rows: Tensor) -> list[Tensor]:
        plain = rows.square().sum(1, dtype=torch.float64)
        if statistics is None:
            return [torch.zeros_like(plain), plain]
        products = (rows @ statistics.hessian).mul_(rows)
        return [products.sum(1, dtype=torch.float64), plain]

    (lost, plain_lost), (had, plain_had) = energy(weight - values), energy(weight)
    return torch.stack([lost, had, plain_lost, plain_had])


def relative_errors(sums: Tensor, *, measured: bool) -> tuple[float | None, float]:
    """Return the relative squared error in the inputs' metric, and plain.

    Args:
        sums: ``[4, R]``, see :func:`row_sums`.
        measured: Whether there were statistics.
    """
    lost, had, plain_lost, plain_had = sums.sum(1).tolist()
    error = lost / max(had, 1e-30) if measured else None
    return error, plain_lost / max(plain_had, 1e-30)


@dataclass(frozen=True)
class Job:
    """Layers of one stack, and what they are coded by.

    Attributes:
        layers: All of one method and scheme.
        weights: ``[R, C]`` of each, any float type; read by the coders only.
        statistics: Of their input, in its coders.
        tokens: That the statistics run over; ``None`` without any.
        few: Why statistics cannot be used, if so.
        importance: float32 ``[C]`` of the input's columns, instead of statistics.
        coders: Processes that code it, each an equal share of the rows.
    """

    layers: Sequence[LayerPlan]
    weights: Callable[[], Sequence[Tensor]]
    statistics: LayerStatistics | None = None
    tokens: int | None = None
    few: str | None = None
    importance: Tensor | None = None
    coders: tuple[int, ...] = (0,)

    @property
    def rows(self) -> list[int]:
        """Rows of each layer."""
        return [layer.shape[0] for layer in self.layers]

    @property
    def scheme(self) -> Scheme:
        """Of all layers."""
        return self.layers[0].scheme

    def share(self, rank: int) -> slice | None:
        """Return the rows that a process codes, if it does."""
        if rank not in self.coders:
            return None
        place, count, total = self.coders.index(rank), len(self.coders), sum(self.rows)
        return slice(place * total // count, (place + 1) * total // count)


class Part:
    """Codes and records of one part.

    Args:
        quantizers: The methods by name.
        layers: What will be added, to show how far it is.
        team: The processes that code it together; all of them get all codes.
        device: Where the codes of other processes come to lie.
    """

    def __init__(
        self,
        quantizers: Mapping[str, Quantizer],
        layers: Sequence[Sequence[LayerPlan]],
        *,
        team: Team | None = None,
        device: str = "cpu",
    ) -> None:
        self._quantizers = quantizers
        self._team, self._device = team or Team(), device
        self.tensors: dict[str, QuantizedTensor] = {}
        self.records: dict[str, LayerRecord] = {}
        total = sum(map(len, layers))
        self._bar = progress_bar(total=total, leave=False, unit="layer")

    def coders(self, stacks: Sequence[Sequence[LayerPlan]]) -> list[tuple[int, ...]]:
        """Return the processes that should code each of some stacks."""
        shapes = [(sum(x.shape[0] for x in s), s[0].shape[1]) for s in stacks]
        least = self._team.size * (_LEAST_ROWS if "cuda" in self._device else 1)
        apart = [
            rows >= least
            and self._quantizers[s[0].method].codes_rows_apart(s[0].scheme)
            for s, (rows, _) in zip(stacks, shapes, strict=True)
        ]
        return coders(shapes, apart, self._team.size)

    def add(
        self,
        layers: Sequence[LayerPlan],
        weights: Sequence[Tensor],
        statistics: LayerStatistics | None,
        few: str | None = None,
        *,
        importance: Tensor | None = None,
    ) -> list[Tensor]:
        """Quantize layers of one stack; returns the float32 values of each.

        The arguments are those of :class:`Job`.
        """
        tokens = None if statistics is None else statistics.tokens
        job = Job(layers, lambda: weights, statistics, tokens, few, importance)
        return self.add_all([job])[0]

    def add_all(self, jobs: Sequence[Job]) -> list[list[Tensor]]:
        """Quantize stacks that do not depend on each other.

        Returns:
            The float32 values of each layer of each stack.
        """
        codes: dict[str, QuantizedTensor] = {}
        sums: dict[str, Tensor] = {}
        seconds: dict[str, float] = {}
        for numbers in self._alike(jobs):
            alike = [jobs[number] for number in numbers]
            self._bar.set_description(alike[0].layers[0].name)
            for number, coded in zip(numbers, self._coded(alike), strict=True):
                key = str(number)
                codes[key], sums[_SUMS + key], seconds[key] = coded
        tensors, about = packed(codes)
        found = [
            _Pieces(unpacked(given, said), given, took)
            for given, (said, took) in self._team.exchange(
                tensors | sums, (about, seconds), self._device
            )
        ]
        return [self._joined(job, str(n), found) for n, job in enumerate(jobs)]

    def _alike(self, jobs: Sequence[Job]) -> list[list[int]]:
        """Return numbers of the jobs of this process, those of a kind together."""
        kinds: dict[object, list[int]] = {}
        for number, job in enumerate(jobs):
            rows = job.share(self._team.rank)
            if rows is None:
                continue
            first = job.layers[0]
            kind: object = number
            if job.few is None and job.importance is None:
                shape = rows.stop - rows.start, first.shape[1]
                kind = first.method, first.scheme, shape, job.tokens is None
            kinds.setdefault(kind, []).append(number)
        found = []
        for numbers in kinds.values():
            size = sum(jobs[numbers[0]].rows) * jobs[numbers[0]].layers[0].shape[1]
            most = max(1, _WEIGHTS_AT_ONCE // size)
            found += [numbers[i : i + most] for i in range(0, len(numbers), most)]
        return found

    def _coded(
        self, jobs: Sequence[Job]
    ) -> list[tuple[QuantizedTensor, Tensor, float]]:
        """Return codes of this process's rows of stacks of a kind.

        Returns:
            Codes, sums of errors, and seconds of each.
        """
        first, results = jobs[0], []
        quantizer, scheme = self._quantizers[first.layers[0].method], first.scheme
        weights = []
        for job in jobs:
            rows = job.share(self._team.rank)
            weights.append(torch.cat([w.float() for w in job.weights()])[rows])
        started = time.perf_counter()
        needed = quantizer.needs_statistics
        if needed and first.statistics is not None and first.few is not None:
            coded = [experts.coded_blindly(quantizer, weights[0], scheme, first.few)]
        elif first.importance is not None:
            importance = first.importance.to(weights[0].device)
            coded = [quantizer.quantize_by_importance(weights[0], scheme, importance)]
        else:
            used = [job.statistics if needed else None for job in jobs]
            coded = quantizer.quantize_alike(weights, scheme, used)
        seconds = (time.perf_counter() - started) / len(jobs)
        for job, weight, found in zip(jobs, weights, coded, strict=True):
            measured = job.statistics if job.tokens else None
            sums = row_sums(weight, found.dequantize(), measured)
            results.append((found, sums, seconds))
        return results

    def _joined(
        self,
        job: Job,
        key: str,
        found: Sequence[_Pieces],
    ) -> list[Tensor]:
        """Take in what the coders of a stack found; return the values of each layer."""
        pieces, rows = [found[rank] for rank in job.coders], job.rows
        parts = [piece.codes[key] for piece in pieces]
        coded = parts[0] if len(parts) == 1 else join_rows(parts)
        seconds = sum(piece.seconds[key] for piece in pieces)
        sums = torch.cat([piece.sums[_SUMS + key] for piece in pieces], 1)
        by_row = torch.split(sums, rows, 1)
        values = []
        for layer, sum_of, tensor in zip(
            job.layers, by_row, coded.split_rows(rows), strict=True
        ):
            error, plain = relative_errors(sum_of, measured=bool(job.tokens))
            share = seconds * layer.shape[0] / sum(rows)
            self.tensors[layer.name] = tensor
            self.records[layer.name] = LayerRecord(error, plain, share, job.tokens)
            values.append(tensor.dequantize())
            self._bar.update()
        return values

    def close(self) -> None:
        """Take the progress bar away."""
        self._bar.close()


@dataclass(frozen=True)
class _Pieces:
    """What one process coded, by number of the stack."""

    codes: Mapping[str, QuantizedTensor]
    sums: Mapping[str, Tensor]
    seconds: Mapping[str, float]


class PartWriter:
    """Writes finished parts while the next one is made; leaving waits for the last.

    Args:
        workdir: Where they go.
        writes: Whether it is this process that writes what it is given.
    """

    def __init__(self, workdir: WorkDir, *, writes: bool = True) -> None:
        self._workdir, self._writes = workdir, writes
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> PartWriter:
        """Return itself."""
        return self

    def save(self, name: str, part: Part) -> None:
        """Write a part, after the one before it is on disk."""
        part.close()
        self.wait()
        if not self._writes:
            return
        self._last = self._pool.submit(
            self._workdir.save_part, name, part.tensors, part.records
        )

    def wait(self) -> None:
        """Return when the last part is on disk."""
        if self._last is not None:
            self._last.result()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for what is being written; an error of the body goes first."""
        self._pool.shutdown()
        if kind is None:
            self.wait()
