"""Our encoders of ggml's types beside ggml's own: error, bytes, speed.

    python benchmarks/gguf_encoders.py [--device cuda] [--rows 1024]

Weights are Student-t with 5 degrees of freedom, rows of 1024; importance of columns is
lognormal. Ours is round to nearest with the search that all methods begin with; ggml's
is ``ggml_quantize_chunk`` of the library inside llama-cpp-python, left out where that
is not installed. Errors are relative root mean squares, weighted by importance where it
is given. A block is what ggml calls one: 256 columns of a K type, else 32. Speed counts
scales, codes and bytes, on one thread of a CPU; bytes are put together on the CPU even
for a GPU, which is why its codes are timed alone as well.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import hardware, write_result
from torch import Tensor

from compress.core import grids
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.export.gguf_blocks import (
    CODED_TYPES,
    block_bytes,
    pack_blocks,
    unpack_blocks,
)

COLUMNS = 1024
REPEATS = 3


def weights(rows: int) -> Tensor:
    """Return Student-t weights ``[rows, 1024]``."""
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, COLUMNS, generator=draw)
    chi = torch.randn(5, rows, COLUMNS, generator=draw).square().sum(0) / 5
    return 0.02 * normal / chi.sqrt()


def importance() -> Tensor:
    """Return a weight for each column."""
    return torch.randn(COLUMNS, generator=torch.Generator().manual_seed(7)).exp()


def coded(weight: Tensor, kind: str, given: Tensor | None) -> QuantizedTensor:
    """Return our codes and scales."""
    scheme = Scheme.parse(kind)
    groups = grids.as_groups(weight, scheme)
    if given is not None:
        given = given.view(groups.shape[1], -1)
    found = grids.search_parameters(groups, scheme, importance=given, by_magnitude=True)
    codes = grids.encode(groups, found, scheme).view(weight.shape)
    return grids.assemble(codes, found, scheme)


def encoded(weight: Tensor, kind: str, given: Tensor | None) -> np.ndarray:
    """Return our bytes ``[rows, row_bytes]``."""
    return pack_blocks(coded(weight, kind, given))


def peer() -> Callable[[Tensor, str, Tensor | None], np.ndarray] | None:
    """Return ggml's encoder, if there is one."""
    if find_spec("llama_cpp") is None:
        return None
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    import ggml_oracle

    return ggml_oracle.encoded  # type: ignore[no-any-return]


def error(
    weight: Tensor,
    data: np.ndarray,
    kind: str,
    given: Tensor | None,
    outer: Tensor | None = None,
) -> float:
    """Return the relative root mean square of what bytes decode to.

    ``outer`` is what NVFP4 keeps beside them; ggml's encoder has none.
    """
    squares = (unpack_blocks(data, kind, outer).dequantize() - weight).square()
    total = weight.square()
    if given is not None:
        squares, total = squares * given, total * given
    return float((squares.double().sum() / total.double().sum()).sqrt())


def speed(encode: Callable[[], Any], count: int, device: str) -> float:
    """Return million weights a second, the best of a few tries."""
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        encode()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return count / best / 1e6


def row_of(kind: str, weight: Tensor, informed: bool, device: str) -> dict[str, Any]:
    """Return the figures of one type."""
    given = importance() if informed else None
    here = weight.to(device)
    given_here = None if given is None else given.to(device)
    found = coded(here, kind, given_here)
    ours = pack_blocks(found)
    row: dict[str, Any] = {"type": kind, "importance": informed}
    outer = found.outer.cpu() if kind == "nvfp4" and found.outer is not None else None
    row["error"] = error(weight, ours, kind, given, outer)
    theirs = peer()
    if theirs is not None:
        data = theirs(weight, kind, given)
        row["error ggml"] = error(weight, data, kind, given)
        row["ours / ggml"] = row["error"] / row["error ggml"]
        size = block_bytes(kind)
        same = ours.reshape(-1, size) == data.reshape(-1, size)
        row["identical blocks"] = float(same.all(1).mean())
    count = weight.numel()
    row["Mweights/s"] = speed(lambda: encoded(here, kind, given_here), count, device)
    if device != "cpu":
        row["Mweights/s codes"] = speed(
            lambda: coded(here, kind, given_here), count, device
        )
    elif theirs is not None:
        row["Mweights/s ggml"] = speed(
            lambda: theirs(weight, kind, given), count, "cpu"
        )
    return row


def main() -> None:
    """Measure all types and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--types", default=",".join(CODED_TYPES))
    parser.add_argument("--name", help="of the result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weight, rows = weights(arguments.rows), []
    for kind in arguments.types.split(","):
        for informed in (False, True):
            rows.append(row_of(kind, weight, informed, arguments.device))
            print(rows[-1], flush=True)
    cuda = arguments.device.startswith("cuda")
    where = torch.cuda.get_device_name() if cuda else hardware()
    write_result(
        arguments.name or ("gguf_encoders_gpu" if cuda else "gguf_encoders"),
        claim="Encoders of ggml's types: relative error equal to that of ggml's own on "
        f"{arguments.rows} x {COLUMNS} Student-t weights; speed on one core or a GPU.",
        figures={"on": where, "Encoders": rows},
        versions=("compress-llm", "torch", "llama-cpp-python"),
    )


if __name__ == "__main__":
    main()
