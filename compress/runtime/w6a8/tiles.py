"""The layout ``w6t1`` of 6-bit codes in memory, as kernels read them; exact inverse.

A code ``q`` is held as the byte ``4 q``, two's complement in its top six bits, so that
unpacking needs no sign fix; sums are four times too large until the end. A tile is 16
rows by 128 columns in 1536 bytes. Lane ``l`` of a warp (``r = l / 4``, ``c = l % 4``)
owns what it feeds to the tensor cores (``mma.m16n8k32``, steps ``j`` of 32 columns):

    a0, a1: rows r, r + 8, columns 32 j + 4 c + {0..3};  a2, a3: the same, 16 on

and stores it as twelve words, ``hi`` being the upper four bits of a byte, ``lo`` the
next two:

    L[2j] = hi(a0) | hi(a1) >> 4,  L[2j+1] = hi(a2) | hi(a3) >> 4
    H[j]  = lo(a0) >> 2 | lo(a1) | lo(a2) << 2 | lo(a3) << 4

Chunk ``i`` (``L0..3``, ``L4..7``, ``H0..3``) of lane ``l`` is at byte ``512 i + 16 l``.
No shift crosses a byte, so all of it is arithmetic of bytes.

Four tiles below each other are a panel, and lie together: 64 rows by 128 columns, which
Hopper's tensor cores take at once and its copy engine in one piece.

Rows are filled up to 64 and columns to 128 with zeros. Scales are ``[G, N]``, the
numbers on disk; kernels apply the factor 1/4, which a scale in float16 might not bear.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core.errors import SchemeError
from compress.core.scheme import Scheme, Zero
from compress.core.tensors import QuantizedTensor

ROWS = 16
PANEL_ROWS = 64
COLUMNS = 128
TILE_BYTES = ROWS * COLUMNS * 6 // 8
SCALE_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TiledWeight:
    """A matrix of 6-bit codes as tiles.

    Attributes:
        tiles: uint8 ``[ceil(N / 64), ceil(K / 128), 4, 1536]``.
        scales: float16 or bfloat16 ``[G, 64 ceil(N / 64)]``.
        shape: ``(N, K)``.
        group: Columns that share a scale; ``K`` if rows have one scale.
    """

    tiles: Tensor
    scales: Tensor
    shape: tuple[int, int]
    group: int

    @property
    def down(self) -> int:
        """Tiles below each other, a multiple of four."""
        return self.tiles.shape[0] * self.tiles.shape[2]

    @property
    def across(self) -> int:
        """Tiles beside each other."""
        return self.tiles.shape[1]

    @classmethod
    def from_quantized(cls, tensor: QuantizedTensor) -> TiledWeight:
        """Return the tiles of a matrix.

        Raises:
            SchemeError: The kernels cannot compute with it; see :func:`obstacle`.
        """
        problem = obstacle(tensor.scheme, tensor.shape)
        if problem is not None:
            raise SchemeError(problem)
        rows, columns = tensor.shape
        scales = torch.zeros(
            tensor.scale.shape[1],
            -(-rows // PANEL_ROWS) * PANEL_ROWS,
            dtype=tensor.scale.dtype,
            device=tensor.scale.device,
        )
        scales[:, :rows] = tensor.scale.t()
        group = tensor.scheme.group_of(columns)
        return cls(pack_tiles(tensor.codes), scales, (rows, columns), group)

    def quantized(self, scheme: Scheme) -> QuantizedTensor:
        """Return the matrix that :meth:`from_quantized` was given, with its scheme."""
        scale = self.scales[:, : self.shape[0]].t().contiguous()
        return QuantizedTensor(
            unpack_tiles(self.tiles, self.shape), scale, None, scheme
        )


def obstacle(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Return why the kernels cannot compute with a layer; ``None`` if they can.

    Args:
        scheme: Of weights and inputs.
        shape: Rows and columns.
    """
    if not scheme.is_integer or scheme.bits != 6 or scheme.zero is not Zero.NONE:
        return f"{scheme.name} is not 6-bit integers around zero"
    if scheme.row_block != 1 or scheme.rank:
        return f"{scheme.name} has scales of several rows or a low-rank correction"
    if scheme.scale_dtype not in ("float16", "bfloat16"):
        return (
            f"scales are {scheme.scale_dtype}; float16 and bfloat16 are computed with"
        )
    inputs = scheme.inputs
    if inputs is not None and (inputs.grid != "int8" or inputs.two_level):
        return f"inputs are {inputs.grid}, not int8"
    for group in (scheme.group_size, inputs.group_size if inputs else None):
        if group is None or group == shape[1]:
            continue
        if group < 32 or group & (group - 1):
            return (
                f"{scheme.name} has groups of {group} columns; 32, 64, 128 and so on "
                "are computed with"
            )
    if shape[1] > 1 << 24:
        return f"{shape[1]} columns are more than the kernels count"
    return None


def run_of(*groups: int | None) -> int:
    """Return over how many columns, 128 at most, no scale changes."""
    return min([COLUMNS, *(group for group in groups if group is not None)])


def pack_tiles(codes: Tensor) -> Tensor:
    """Return codes as tiles.

    Args:
        codes: int8 ``[N, K]`` in ``[-32, 31]``.

    Returns:
        uint8 ``[ceil(N / 64), ceil(K / 128), 4, 1536]``.
    """
    rows, columns = codes.shape
    panels, across = -(-rows // PANEL_ROWS), -(-columns // COLUMNS)
    down = panels * (PANEL_ROWS // ROWS)
    padded = torch.zeros(
        down * ROWS, across * COLUMNS, dtype=torch.int8, device=codes.device
    )
    padded[:rows, :columns] = codes
    # [down, half of rows, r, across, j, half of step, c, byte]
    b = (padded.view(torch.uint8) << 2).view(down, 2, 8, across, 4, 2, 4, 4)
    high, low = b & 0xF0, b & 0x0C
    nibbles = high[:, 0] | high[:, 1] >> 4  # [down, r, across, j, half, c, byte]
    pairs = low[:, 0, ..., 0, :, :] >> 2 | low[:, 1, ..., 0, :, :]
    pairs |= low[:, 0, ..., 1, :, :] << 2 | low[:, 1, ..., 1, :, :] << 4
    # To [down, across, chunk, r, c, word, byte].
    first = nibbles.view(down, 8, across, 2, 4, 4, 4).permute(0, 2, 3, 1, 5, 4, 6)
    last = pairs.permute(0, 2, 1, 4, 3, 5).unsqueeze(2)
    tiles = torch.cat([first, last], 2).reshape(panels, -1, across, TILE_BYTES)
    return tiles.transpose(1, 2).contiguous()


def unpack_tiles(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the codes that :func:`pack_tiles` packed.

    Args:
        tiles: uint8 ``[ceil(N / 64), ceil(K / 128), 4, 1536]``.
        shape: ``(N, K)``.

    Returns:
        int8 ``[N, K]``.
    """
    across = tiles.shape[1]
    chunks = tiles.transpose(1, 2).reshape(-1, across, 3, 8, 4, 4, 4)
    down = len(chunks)
    # Back to [down, r, across, j, half, c, byte] and [down, r, across, j, c, byte].
    nibbles = chunks[:, :, :2].permute(0, 3, 1, 2, 5, 4, 6)
    nibbles = nibbles.reshape(down, 8, across, 4, 2, 4, 4)
    pairs = chunks[:, :, 2].permute(0, 2, 1, 4, 3, 5)
    b = torch.empty(
        down, 2, 8, across, 4, 2, 4, 4, dtype=torch.uint8, device=tiles.device
    )
    b[:, 0], b[:, 1] = nibbles & 0xF0, nibbles << 4
    b[:, 0, ..., 0, :, :] |= pairs << 2 & 0x0C
    b[:, 1, ..., 0, :, :] |= pairs & 0x0C
    b[:, 0, ..., 1, :, :] |= pairs >> 2 & 0x0C
    b[:, 1, ..., 1, :, :] |= pairs >> 4 & 0x0C
    codes = b.view(down * ROWS, across * COLUMNS).view(torch.int8) >> 2
    return codes[: shape[0], : shape[1]].contiguous()
