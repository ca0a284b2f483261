"""A few calls of one W6A8 layer, for a profiler.

    ncu --set full -k 'regex:few|hopper' -s 2 -c 1 python benchmarks/w6a8/profiled.py

Options choose the layer; without ``--group`` a row of the weight has one scale.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from exactness import Checks

from compress.runtime.w6a8 import abi, build, cuda
from compress.runtime.w6a8.arguments import Values

CALLS = 4


def main() -> None:
    """Call the layer."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, usual in (("tokens", 1), ("rows", 8192), ("columns", 8192)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--group", type=int, help="columns; none: a scale for each row")
    options = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    arch = build.architecture(torch.cuda.get_device_capability(device))
    kernels = abi.Kernels(build.build(arch))
    make = Checks(kernels, device)
    x = make.activations(options.tokens, options.columns, torch.bfloat16)
    weight = make.weight(options.rows, options.columns, options.group)
    for _ in range(CALLS):
        cuda.linear(kernels, Values(x), weight, None, group=None)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
