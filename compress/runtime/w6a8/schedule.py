"""How a linear layer is cut into blocks.

Mirrors ``Shape`` of ``csrc/w6a8_linear.cuh`` and ``HopperShape`` of
``csrc/w6a8_hopper.cuh``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil
from typing import ClassVar

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
        token_tile: Tokens of a block: 8, 16, 32 or 64; see :data:`HOPPER_BLOCKS`.
        splits: Blocks that share the columns.
        blocks: Of the result, each of ``splits`` parts.
        workspace: float32 numbers that splits leave for each other.
        on_hopper: Whether it is the kernel that only Hopper has.
        panels: Of 64 rows in a block of Hopper's.
        at_once: Blocks that the device holds; Hopper's kernel starts no more.
        near: Steps of a block after the first that Hopper's kernel brings into the
            cache.
    """

    token_tile: int
    splits: int
    blocks: int
    workspace: int
    on_hopper: bool = False
    panels: int = 0
    at_once: int = 0
    near: int = 0


@dataclass(frozen=True)
class FewSchedule:
    """The cut of a call of the kernel for few tokens; mirrors ``w6a8_few.cuh``.

    Attributes:
        tiles: Of 16 rows in a block at a time.
        depth: Steps of 128 columns that a warp copies ahead.
        near: Steps of a block after those that are brought into the cache.
        at_once: Blocks.
    """

    SLOT: ClassVar[int] = 256  # columns that a warp rounds at once
    SLOTS: ClassVar[int] = 56  # of a block

    tiles: int
    depth: int
    near: int
    at_once: int


_FEW_TOKENS, _FEW_WARPS = 16, 8
_NEAR = 128 << 10  # bytes that a block brings into the cache ahead
_HALF, _WHOLE = 113 << 10, 227 << 10  # of Hopper's shared memory: two blocks, or one


@lru_cache(maxsize=4096)
def few_schedule(
    tokens: int, down: int, across: int, run: int, processors: int
) -> FewSchedule | None:
    """Return the cut for the kernel for few tokens; ``None`` if it cannot do it.

    Rows are dealt evenly; blocks that leave room for the next call's are preferred.

    Args:
        tokens: Rows of the input, one or more.
        down: Tiles of 16 rows.
        across: Tiles of 128 columns.
        run: Columns after which a scale may change; 0 if it does not.
        processors: Multiprocessors of the device.
    """
    if tokens > _FEW_TOKENS:
        return None
    tiles = min((4, 2, 1), key=lambda tiles: ceil(down / tiles / processors) * tiles)
    slot = _FEW_WARPS * (1536 + (4096 // run if run else 0))
    share = (_FEW_WARPS - tiles) * (1024 if tokens > 8 else 512)
    fixed = tokens * (128 * across + 16) + 2 * share + 8 * FewSchedule.SLOTS + 64
    for depth, room in ((6, _HALF), (12, _WHOLE), (6, _WHOLE)):
        if fixed + depth * slot <= room:
            near = _NEAR // (tiles * 1536)
            return FewSchedule(tiles, depth, near, min(down // tiles, processors))
    return None


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
    return Schedule(token_tile, splits, blocks, workspace)


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
        *(block.tokens, splits, blocks, workspace, True, block.panels, processors),
        _NEAR // (block.panels * 6144),
    )
