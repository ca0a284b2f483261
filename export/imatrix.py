"""Importance matrices of llama.cpp: mean squares of the inputs of each column.

An encoder that knows them minimises ``sum_c E[x_c^2] (w_c - q_c)^2`` instead of the
plain squared error, and ``llama-quantize --imatrix`` is such an encoder. Stored are the
sum of ``x_c^2`` over tokens and their number, by the weight's GGUF name; experts of one
stacked tensor have a row each. The order of rows in q and k does not matter: columns
are inputs.

Source: llama.cpp ``tools/imatrix/imatrix.cpp`` (the GGUF flavour, since July 2025).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.core.statistics import InputSquares
from compress.export.gguf_blocks import Bytes
from compress.export.gguf_layout import Placement
from compress.export.gguf_reader import Floats
from compress.export.gguf_writer import TensorRow, text, texts, whole, write_gguf

SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Importance:
    """What the inputs of one tensor looked like.

    Attributes:
        sums: float32 ``[E, C]``, the sum of ``x^2`` over tokens; one row a matrix.
        counts: float32 ``[E]``, tokens that each matrix has seen.
    """

    sums: Floats
    counts: Floats

    def means(self) -> Floats:
        """Return float32 ``[E, C]`` mean squares; ones for a matrix without tokens."""
        counts = self.counts[:, None]
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), np.float32(1))


@dataclass(frozen=True)
class ImportanceMatrix:
    """Importances of a model.

    Attributes:
        entries: By GGUF name of the weight, ``.weight`` included.
        datasets: Names of the texts.
        chunks: Number of sequences.
        chunk_tokens: Tokens of a sequence.
    """

    entries: Mapping[str, Importance]
    datasets: tuple[str, ...]
    chunks: int
    chunk_tokens: int


def write_imatrix(path: Path, matrix: ImportanceMatrix) -> None:
    """Write an importance matrix in the GGUF flavour.

    Args:
        path: A file that does not exist yet.
        matrix: What to write; names in the order of the file.

    Raises:
        ExportError: The file cannot be written.
    """
    metadata = {
        "general.type": text("imatrix"),
        "imatrix.datasets": texts(matrix.datasets),
        "imatrix.chunk_count": whole(matrix.chunks),
        "imatrix.chunk_size": whole(matrix.chunk_tokens),
    }
    rows = []
    for name, entry in matrix.entries.items():
        matrices, columns = entry.sums.shape
        rows += [
            TensorRow(name + SUMS, "f32", (matrices, columns), 4 * entry.sums.size),
            TensorRow(name + COUNTS, "f32", (matrices, 1), 4 * matrices),
        ]
    write_gguf(path, metadata, rows=rows, data=_data(matrix))


def _data(matrix: ImportanceMatrix) -> Iterator[Bytes]:
    for entry in matrix.entries.values():
        for values in (entry.sums, entry.counts):
            yield np.ascontiguousarray(values, dtype="<f4").reshape(-1).view(np.uint8)


def matrix_of(
    placements: Iterable[Placement], squares: InputSquares
) -> ImportanceMatrix:
    """Return the importance matrix of the linear layers inside a model's blocks.

    Args:
        placements: Where the weights lie; those that were not measured are left out.
        squares: By module name.
    """
    entries = {}
    for placement in placements:
        layers = placement.stack or ((placement.source or "").removesuffix(".weight"),)
        if all(layer in squares.sums for layer in layers):
            entries[placement.target] = Importance(
                np.stack([squares.sums[layer].numpy() for layer in layers]),
                np.array([squares.tokens[layer] for layer in layers], np.float32),
            )
    return ImportanceMatrix(
        entries, squares.sources, squares.windows, squares.window_tokens
    )
