"""What differentiable k-means keeps for backward, by the means that make it small.

python benchmarks/edkm_memory.py MODEL [--rows 4096]

One square layer (K = 8, T = 5, one table) with plain DKM, each means of eDKM on top of
the one before, and DKM on distinct values; then all linears of MODEL under palette3.
Bytes are counted as autograd saves them; seconds are forward and backward. A gradient
is held against that of plain DKM, whose float32 sums depend on the number of threads,
and against float64 on distinct values, which the tests hold against plain DKM.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from results import write_result
from safetensors import safe_open
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from compress.tuning.dkm.assignment import soft_tables, soft_values, temperature
from compress.tuning.dkm.saved import SavedOnHost, SharedIndex
from compress.tuning.dkm.table_domain import cluster, rounded
from compress.tuning.dkm.unique import unique_values

ENTRIES, ITERATIONS, ALPHA, LEARNERS, BLOCK = 8, 5, 0.1, 4, 16
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Count:
    """Distinct storages that autograd holds; leaves are not counted."""

    def __init__(self) -> None:
        self.saved_bytes = 0
        self._seen: dict[int, StorageWeakRef] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        """Note a tensor that has a history."""
        base = tensor if tensor._base is None else tensor._base
        if not base.is_leaf:
            self._note(tensor)
        return tensor.detach()

    def _note(self, tensor: Tensor) -> None:
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage.cdata not in self._seen:
            self._seen[storage.cdata] = storage
            self.saved_bytes += tensor.untyped_storage().nbytes()

    @contextmanager
    def watching(self, *, every: bool = False) -> Iterator[Count]:
        """Count what is saved; with ``every`` also tensors without history."""

        def pack(tensor: Tensor) -> Tensor:
            if every:
                self._note(tensor)
                return tensor.detach()
            return self.pack(tensor)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield self


def plain(weights: Tensor, tables: Tensor) -> Tensor:
    """Return soft weights ``[G, n]`` by plain DKM."""
    values = rounded(weights).unsqueeze(-1)
    start = tables.unsqueeze(-1)
    tau = temperature(start, ALPHA)
    moved = soft_tables(values, start, tau, iterations=ITERATIONS)
    return soft_values(values, moved, tau).squeeze(-1)


def distinct(weights: Tensor, tables: Tensor) -> Tensor:
    """Return soft weights ``[G, n]`` by way of distinct values."""
    tau = temperature(tables.unsqueeze(-1), ALPHA)
    return cluster(rounded(weights), tables, tau, iterations=ITERATIONS)[0]


def spread(weights: Tensor) -> Tensor:
    """Entries at the middles of equal shares of the weights, ``[G, K]``."""
    ordered = weights.bfloat16().float().sort(dim=1).values
    count = weights.shape[1]
    places = ((torch.arange(ENTRIES) + 0.5) / ENTRIES * count).long()
    return ordered[:, places].clone()


def measure(
    weights: Tensor, wanted: Tensor, way: str, learners: dist.ProcessGroup | None = None
) -> tuple[int, float, Tensor]:
    """Return bytes for backward, seconds, and the gradient, by one way."""
    tables = spread(weights)
    weights = weights.clone().requires_grad_()
    started = time.perf_counter()
    counter: Count | SavedOnHost = Count()
    forward: Callable[[Tensor, Tensor], Tensor] = plain
    context: AbstractContextManager[object]
    if way == "plain":
        context = counter.watching()  # type: ignore[union-attr]
    elif way == "distinct":
        context, forward = counter.watching(every=True), distinct  # type: ignore[union-attr]
    else:
        index = None
        if way in ("unique", "shared"):
            found = unique_values(rounded(weights).detach())
            index = SharedIndex(found, learners)
        context = counter = SavedOnHost(marshal=way != "offload", index=index)
    with context:
        soft = forward(weights, tables)
    (gradient,) = torch.autograd.grad(soft, weights, wanted)
    return counter.saved_bytes, time.perf_counter() - started, gradient


WAYS = {
    "plain": "plain DKM, autograd's own",
    "offload": "offloaded, each saved tensor",
    "marshal": "+ marshaling",
    "unique": "+ uniquification",
    "shared": f"+ sharding over {LEARNERS} learners",
    "distinct": "on distinct values (ours)",
}


def layer(rows: int) -> tuple[Tensor, Tensor]:
    """Return weights of one group, and the gradient that comes from the loss."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1, rows * rows, generator=generator) * 0.02
    return weights, torch.randn(1, rows * rows, generator=generator)


def learner(source: str, references: Path) -> None:
    """Be one of the learners; the first prints what it kept."""
    dist.init_process_group("gloo")
    kept, seconds, off, size = 0, 0.0, 0.0, 0.0
    for number, (weights, wanted) in enumerate(cases(source)):
        own, took, gradient = measure(weights, wanted, "shared", dist.group.WORLD)
        file = references / f"{number}.pt"
        expected = torch.load(file, mmap=True, weights_only=True)
        kept, seconds = kept + own, seconds + took
        off += float((gradient - expected).square().sum())
        size += float(expected.square().sum())
    if dist.get_rank() == 0:
        print(json.dumps([kept, seconds, off, size]))
    dist.barrier()
    dist.destroy_process_group()


def learners(source: str, references: Path) -> list[float]:
    """Return what the first of the learners kept, its seconds and gradient error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    team = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__, source, f"--learn={references}"]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | team | {"RANK": str(rank), "WORLD_SIZE": str(LEARNERS)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(LEARNERS)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a learner failed; its error is above")
    found: list[float] = json.loads(outputs[0].splitlines()[-1])
    return found


def ladder(source: str, references: Path) -> list[dict[str, object]]:
    """Return a row for each way: sums over the layers of a source.

    Args:
        source: Of :func:`cases`.
        references: An empty folder, for the gradients of plain DKM.
    """
    sums = {way: [0.0] * 5 for way in WAYS}
    for number, (weights, wanted) in enumerate(cases(source)):
        exact = measure(weights.double(), wanted.double(), "distinct")[2]
        expected = None
        for way in WAYS:
            if way == "shared":
                continue
            kept, seconds, gradient = measure(weights, wanted, way)
            if expected is None:
                torch.save(gradient, references / f"{number}.pt")
                expected = gradient
            off = float((gradient - expected).square().sum())
            size = float(expected.square().sum())
            to_exact = float((gradient - exact).square().sum())
            seen = (kept, seconds, off, size, to_exact)
            sums[way] = [a + b for a, b in zip(sums[way], seen, strict=True)]
    # The learners' gradient is that of the row before, which `off` shows.
    sums["shared"] = [*learners(source, references), sums["unique"][-1]]
    least = sums["plain"][0]
    return [
        _row(name, kept, least, seconds, (off / size) ** 0.5, (exact_off / size) ** 0.5)
        for name, (kept, seconds, off, size, exact_off) in (
            (WAYS[way], sums[way]) for way in WAYS
        )
    ]


def cases(source: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield weights ``[G, n]`` and the gradient that comes from the loss.

    Args:
        source: A number of rows, of one random square layer with one table; or the
            folder of a model, for all its linears with a table for each 16 rows.
    """
    if source.isdigit():
        yield layer(int(source))
        return
    for weight in _linears(Path(source)):
        generator = torch.Generator().manual_seed(0)
        weights = weight.float().reshape(len(weight) // BLOCK, -1)
        yield weights, torch.randn(weights.shape, generator=generator)


def _linears(path: Path) -> Iterator[Tensor]:
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                if name.removesuffix(".weight").endswith(LINEARS):
                    yield tensors.get_tensor(name)


def _row(
    name: str,
    kept: float,
    plain_bytes: float,
    seconds: float,
    off: float,
    to_exact: float,
) -> dict[str, object]:
    return {
        "way": name,
        "MiB for backward": round(kept / 2**20, 2),
        "times less than plain": round(plain_bytes / kept, 1),
        "seconds": round(seconds, 1),
        "gradient, relative difference": float(f"{off:.1e}"),
        "gradient, to float64": float(f"{to_exact:.1e}"),
    }


def main() -> None:
    """Measure both and write the result; or be a learner."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--learn", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.learn:
        learner(given.model, given.learn)
        return
    name = Path(given.model).name
    titles = {
        f"one layer, {given.rows} x {given.rows}, one table": str(given.rows),
        f"all linears of {name}, a table for each 16 rows": given.model,
    }
    figures = {}
    for title, source in titles.items():
        with tempfile.TemporaryDirectory() as folder:
            figures[title] = ladder(source, Path(folder))
        for row in figures[title]:
            print(row, file=sys.stderr, flush=True)
    write_result(
        "edkm_memory",
        claim="Bytes that differentiable k-means keeps for backward (8 entries, 5 "
        "rounds, float32 arithmetic on bf16 values) with each means of eDKM on top of "
        "the one before, and on distinct values; of learners, what one keeps.",
        figures=figures,
        command=f"python benchmarks/edkm_memory.py {name}",
    )


if __name__ == "__main__":
    main()
