"""How a linear layer is cut into blocks.

Mirrors ``Shape`` of ``csrc/w6a8_linear.cuh`` and ``HopperShape`` of
``csrc/w6a8_hopper.cuh``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil

from compress.runtime.w6a8.abi import Kernel

_WARPS = 8
_BLOCKS_AT_ONCE = 2  # of a multiprocessor
_START = 3.0  # steps that filling the pipeline costs
_JOIN = 1.0  # steps that adding up costs, and a tenth of one for each part
_MOST_SPLITS = 32


@dataclass(frozen=True)
class HopperBlock:
    """A size of blocks that Hopper's kernel has.

    Attributes:
        tokens: Of a block.
        panels: Of 64 rows in a block.
        scales: What it can compute with: ``"one"`` for rows and tokens, ``"groups"`` of
            128 or more columns for rows, ``"any"``.
        step_time: Microseconds for 128 columns on an H200, weights at hand.
    """

    tokens: int
    panels: int
    scales: tuple[str, ...]
    step_time: float


HOPPER_BLOCKS = (
    HopperBlock(16, 1, ("one", "groups", "any"), 0.125),
    HopperBlock(32, 1, ("one", "groups"), 0.21),
    HopperBlock(64, 1, ("one", "groups", "any"), 0.3),
    HopperBlock(128, 2, ("one",), 0.57),
    HopperBlock(128, 2, ("groups",), 0.66),
    HopperBlock(128, 3, ("groups",), 0.98),
    HopperBlock(256, 2, ("one",), 0.88),
)
_MOST_PARTS = 8  # that share columns on Hopper
_PANEL_TIME = 6144 / 4.2e6  # microseconds that memory takes for 64 rows, 128 columns
_END, _JOIN_TIME = 0.8, 1.2  # microseconds of a part; of one that others join
_SHARE_TIME = 1 / 30e3  # microseconds for a byte of what parts leave, in a block


@dataclass(frozen=True)
class Schedule:
    """The cut of one call.

    Attributes:
        kernel: Which one; Hopper's runs there only, that for few tokens on what has as
            much shared memory.
        token_tile: Tokens of a block: 8, 16, 32 or 64; see :data:`HOPPER_BLOCKS`.
        blocks: Of the result, each of ``splits`` parts.
        splits: Blocks that share the columns.
        workspace: float32 numbers that splits leave for each other.
        panels: Of 64 rows in a block of Hopper's.
        at_once: Blocks that the device holds; kernels whose blocks stay start no more.
        tiles: Of 16 rows in a block, for few tokens.
        depth: Steps of 128 columns that a warp copies ahead, for few tokens.
    """

    kernel: Kernel
    token_tile: int
    blocks: int
    splits: int = 1
    workspace: int = 0
    panels: int = 0
    at_once: int = 0
    tiles: int = 0
    depth: int = 0


_FEW_TOKENS, _FEW_WARPS = 16, 8
_SET_TOKENS = 8  # of one product; more than these are two sets
# Tiles that a multiprocessor has to go through for two sets to pay, seen on an H200.
_SET_TILES = 5
_SMALL_COPIES = 0.1  # what two tiles of rows cost more than four, of the time


@lru_cache(maxsize=4096)
def few_schedule(
    tokens: int, down: int, across: int, processors: int, run: int, shared: int
) -> Schedule | None:
    """Return the cut for the kernel for few tokens; ``None`` if it cannot do it.

    Rows are dealt evenly, and copies run ahead as far as memory allows.

    Args:
        tokens: Rows of the input, one or more.
        down: Tiles of 16 rows.
        across: Tiles of 128 columns.
        processors: Multiprocessors of the device.
        run: Columns after which a scale may change; 0 if it does not.
        shared: Bytes of shared memory that a block can have.
    """
    if tokens > _FEW_TOKENS:
        return None

    def time_of(tiles: int) -> float:
        most = ceil(down / tiles / processors) * tiles  # of a block
        return most * (1 + _SMALL_COPIES * (4 // tiles - 1))

    tiles = min((4, 2, 1), key=time_of)
    slot = _FEW_WARPS * (1536 + (4096 // run if run else 0))
    sets = ceil(tokens / _SET_TOKENS)
    fixed = tokens * (128 * across + 16) + 2 * 512 * (_FEW_WARPS - tiles) * sets
    for depth in (12, 6, 3)[: 1 + sets]:
        if fixed + depth * slot <= shared:
            return Schedule(
                kernel="few",
                token_tile=_SET_TOKENS * sets,
                blocks=down // tiles,
                at_once=processors,
                tiles=tiles,
                depth=depth,
            )
    return None


def few_pays(tokens: int, down: int, processors: int, run: int) -> bool:
    """Return whether the kernel for few tokens is faster than Hopper's, if it can.

    The arguments are those of :func:`few_schedule`.
    """
    return tokens <= _SET_TOKENS or (run > 0 and down >= _SET_TILES * processors)


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
    workspace = splits * tokens * 16 * down if splits > 1 else 0
    return Schedule("portable", token_tile, blocks, splits, workspace)


@lru_cache(maxsize=4096)
def hopper_schedule(
    tokens: int, down: int, across: int, processors: int, scales: str
) -> Schedule:
    """Return the cut for Hopper's kernel, whose blocks stay for several parts.

    Args:
        tokens: Rows of the input, one or more.
        down: Tiles of 16 rows.
        across: Tiles of 128 columns.
        processors: Multiprocessors of the device.
        scales: See :class:`HopperBlock`.
    """

    def blocks_of(block: HopperBlock) -> int:
        return ceil(down / (4 * block.panels)) * ceil(tokens / block.tokens)

    def time_of(block: HopperBlock, splits: int) -> float:
        parts = blocks_of(block) * splits
        busy = min(parts, processors)
        step = block.step_time
        if tokens <= block.tokens:  # all weights come from memory
            step = max(step, _PANEL_TIME * block.panels * busy)
        share = block.panels * 64 * block.tokens * 4 * _SHARE_TIME
        part = ceil(across / splits) * step + _END
        if splits > 1:
            part += _JOIN_TIME + 2 * share
        return ceil(parts / processors) * part + (splits - 1) * share

    block, splits = min(
        product(
            (block for block in HOPPER_BLOCKS if scales in block.scales),
            range(1, min(across, _MOST_PARTS) + 1),
        ),
        key=lambda cut: time_of(*cut),
    )
    blocks = blocks_of(block)
    workspace = splits * blocks * block.panels * 64 * block.tokens if splits > 1 else 0
    return Schedule(
        "hopper", block.tokens, blocks, splits, workspace, block.panels, processors
    )
