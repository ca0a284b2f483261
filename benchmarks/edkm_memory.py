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


def learner(rows: int, reference: Path) -> None:
    """Be one of the learners; the first prints what it kept."""
    dist.init_process_group("gloo")
    weights, wanted = layer(rows)
    kept, seconds, gradient = measure(weights, wanted, "shared", dist.group.WORLD)
    expected = torch.load(reference, mmap=True, weights_only=True)
    off = float((gradient - expected).norm() / expected.norm())
    if dist.get_rank() == 0:
        print(json.dumps([kept, seconds, off]))
    dist.barrier()
    dist.destroy_process_group()


def learners(rows: int, reference: Path) -> tuple[int, float, float]:
    """Return bytes, seconds and gradient difference of the first of the learners."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    team = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__, "-", f"--rows={rows}", f"--learn={reference}"]
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
    kept, seconds, off = json.loads(outputs[0].splitlines()[-1])
    return kept, seconds, off


def ladder(rows: int, folder: Path) -> list[dict[str, object]]:
    """Return a row for each way, for one square layer."""
    weights, wanted = layer(rows)
    exact = measure(weights.double(), wanted.double(), "distinct")[2]
    reference = folder / "gradient.pt"
    found, least = [], 0
    for way, name in WAYS.items():
        if way == "shared":
            kept, seconds, off = learners(rows, reference)
        else:
            kept, seconds, gradient = measure(weights, wanted, way)
            if way == "plain":
                torch.save(gradient, reference)
                least = kept
            expected = torch.load(reference, mmap=True, weights_only=True)
            off = float((gradient - expected).norm() / expected.norm())
            to_exact = float((gradient - exact).norm() / exact.norm())
            del gradient
        # The learners' gradient is that of the row before, which `off` shows.
        found.append(_row(name, kept, least, seconds, off, to_exact))
        print(found[-1], file=sys.stderr, flush=True)
    return found


def model(path: Path) -> list[dict[str, object]]:
    """All linears under a table for each 16 rows."""
    ways = [way for way in WAYS if way != "shared"]
    sums = {way: [0, 0.0, 0.0, 0.0, 0.0] for way in ways}
    for weight in _linears(path):
        generator = torch.Generator().manual_seed(0)
        weights = weight.float().reshape(len(weight) // BLOCK, -1)
        wanted = torch.randn(weights.shape, generator=generator)
        exact = measure(weights.double(), wanted.double(), "distinct")[2]
        expected = None
        for way in ways:
            kept, seconds, gradient = measure(weights, wanted, way)
            expected = gradient if expected is None else expected
            total = sums[way]
            total[0] += kept
            total[1] += seconds
            total[2] += float((gradient - expected).square().sum())
            total[3] += float(expected.square().sum())
            total[4] += float((gradient - exact).square().sum())
    least = int(sums["plain"][0])
    return [
        _row(
            WAYS[way],
            int(kept),
            least,
            seconds,
            (off / size) ** 0.5,
            (to_exact / size) ** 0.5,
        )
        for way, (kept, seconds, off, size, to_exact) in sums.items()
    ]


def _linears(path: Path) -> Iterator[Tensor]:
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                if name.removesuffix(".weight").endswith(LINEARS):
                    yield tensors.get_tensor(name)


def _row(
    name: str,
    kept: int,
    plain_bytes: int,
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
    """Measure both and write the result; or be a learner of the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--learn", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.learn:
        learner(given.rows, given.learn)
        return
    with tempfile.TemporaryDirectory() as folder:
        one = ladder(given.rows, Path(folder))
    write_result(
        "edkm_memory",
        claim="Bytes that differentiable k-means keeps for backward (8 entries, 5 "
        "rounds, float32 arithmetic on bf16 values) with each means of eDKM on top of "
        "the one before, and on distinct values.",
        figures={
            f"one layer, {given.rows} x {given.rows}, one table": one,
            f"all linears of {given.model.name}, a table for each 16 rows": model(
                given.model
            ),
        },
        command=f"python benchmarks/edkm_memory.py {given.model.name}",
    )


if __name__ == "__main__":
    main()
