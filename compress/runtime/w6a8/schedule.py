"""How a linear layer is cut into blocks; mirrors ``Shape`` of ``csrc/w6a8_linear``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

_WARPS = 8
_BLOCKS_AT_ONCE = 2  # of a multiprocessor
_START = 3.0  # steps that filling the pipeline costs
_JOIN = 1.0  # steps that adding up costs, and a tenth of one for each part
_MOST_SPLITS = 32


@dataclass(frozen=True)
class Schedule:
    """The cut of one call.

    Attributes:
        token_tile: Tokens of a block: 8, 16, 32 or 64.
        splits: Blocks that share the columns.
        blocks: Of the result, each of ``splits`` parts.
    """

    token_tile: int
    splits: int
    blocks: int


@lru_cache(maxsize=4096)
def schedule(tokens: int, down: int, across: int, processors: int) -> Schedule:
    """Return the cut that keeps all multiprocessors busy for the fewest steps.

    Args:
        tokens: Rows of the input, one or more.
        down: Tiles of 16 rows.
        across: Tiles of 128 columns.
        processors: Multiprocessors of the device.
    """
    token_tile = next((tile for tile in (8, 16, 32) if tokens <= tile), 64)
    rows = 2 if token_tile <= 16 else 4  # in tiles
    blocks = ceil(down / rows) * ceil(tokens / token_tile)
    steps = ceil(across / (_WARPS // rows))

    def cost(splits: int) -> float:
        waves = ceil(blocks * splits / (_BLOCKS_AT_ONCE * processors))
        joining = _JOIN + splits / 10 if splits > 1 else 0.0
        return waves * (ceil(steps / splits) + _START) + joining

    splits = min(range(1, min(steps, _MOST_SPLITS) + 1), key=cost)
    return Schedule(token_tile, splits, blocks)
