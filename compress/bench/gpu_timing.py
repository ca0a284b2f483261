"""Times of single calls on a GPU, in two ways that answer different questions.

*Chain*: a CUDA graph makes the call with one copy of the weight after the other,
together larger than any cache, so each finds its weight in memory; this is what
decoding does.
*Cold*: one call after the cache was overwritten, between two events, with all the fixed
cost of a call: published tables often have this.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

Call = Callable[[], Any]

ROTATED_CACHES = 4
LEAST_COPIES, MOST_COPIES = 8, 200
_FLUSHED_BYTES = 256 << 20
_ROUND_SECONDS = 0.05
_MOST_REPLAYS, _LEAST_REPLAYS = 20, 3
_CLOCKS = "name,clocks.sm,clocks.mem,power.draw,power.limit,clocks_event_reasons.active"


class Chain:
    """Calls in a CUDA graph, timed by replaying it.

    Args:
        calls: What is recorded, in order; each has been made once before recording.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in (calls[0], calls[-1]):
                call()
        side.synchronize()
        self._count = len(calls)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for call in calls:
                call()
        self._calls = tuple(calls)  # keeps the memory that the graph reads
        self._replays = 1
        once = self.seconds() * self._count
        wanted = int(_ROUND_SECONDS / max(once, 1e-9))
        self._replays = max(_LEAST_REPLAYS, min(_MOST_REPLAYS, wanted))

    def seconds(self) -> float:
        """Return the time of a call, over some replays."""
        start, end = _events()
        start.record()
        for _ in range(self._replays):
            self._graph.replay()
        end.record()
        end.synchronize()
        return _between(start, end) / self._replays / self._count


def cold_seconds(call: Call, flushed: torch.Tensor, *, calls: int) -> float:
    """Return the median time of a call after the cache was overwritten.

    Args:
        call: What is timed.
        flushed: See :func:`flush_buffer`.
        calls: How often.
    """
    times = []
    call()
    for _ in range(calls):
        start, end = _events()
        flushed.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(_between(start, end))
    return median(times)


def flush_buffer() -> torch.Tensor:
    """Return memory that is larger than any cache."""
    return torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")


def copies_of(weight_bytes: int, *, contenders: int) -> int:
    """Return how many copies of a weight a chain needs, and memory can hold.

    Args:
        weight_bytes: Of one copy.
        contenders: How many have copies at the same time.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    cache = int(getattr(properties, "L2_cache_size", 50 << 20))
    wanted = -(-ROTATED_CACHES * cache // weight_bytes)
    free, _ = torch.cuda.mem_get_info()
    room = int(free * 0.6) // contenders // weight_bytes
    return max(1, min(max(wanted, LEAST_COPIES), MOST_COPIES, room))


def read_bandwidth() -> float:
    """Return bytes a second of reading a buffer of 1 GB (the sum of its numbers)."""
    buffer = torch.ones(1 << 28, dtype=torch.float32, device="cuda")
    seconds = min(_timed(buffer.sum) for _ in range(10))
    return buffer.nbytes / seconds


def matmul_peak(dtype: torch.dtype, *, size: int = 8192) -> float:
    """Return operations a second of the library's own product of large matrices.

    Args:
        dtype: bfloat16 or int8.
        size: Rows and columns of both.
    """
    if dtype is torch.int8:
        a = torch.randint(-99, 99, (size, size), dtype=dtype, device="cuda")
        b = a.t()
        seconds = min(_timed(lambda: torch._int_mm(a, b)) for _ in range(10))
    else:
        a = torch.randn(size, size, device="cuda").to(dtype)
        seconds = min(_timed(lambda: a @ a) for _ in range(10))
    return 2 * size**3 / seconds


def clocks() -> str | None:
    """Return what nvidia-smi says about clocks and power; ``None`` without it."""
    command = ["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _timed(call: Call) -> float:
    start, end = _events()
    start.record()
    call()
    end.record()
    end.synchronize()
    return _between(start, end)


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    return start, end


def _between(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    return float(start.elapsed_time(end)) / 1e3
