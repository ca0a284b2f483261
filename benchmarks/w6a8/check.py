"""Is every W6A8 kernel exact on this GPU, and how fast? One command, under 3 minutes.

    python benchmarks/w6a8/check.py            all of it
    python benchmarks/w6a8/check.py inputs sums     only these checks, no timing
    compute-sanitizer python benchmarks/w6a8/check.py inputs "bad inputs"

Needs torch with CUDA, and nvcc; nothing of the toolkit but its own folder. Ends with 1
if a check fails. With ``$OUT`` set, figures are also written to ``$OUT/w6a8.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from exactness import Checks  # noqa: E402
from timing import measure  # noqa: E402

from compress.core.errors import KernelError  # noqa: E402
from compress.runtime.w6a8 import abi, build  # noqa: E402

CLOCKS = "name,clocks.sm,clocks.mem,power.draw,clocks_event_reasons.active"


def clocks() -> str:
    """Return what nvidia-smi says about clocks, or why it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError as error:
        return str(error)


def main() -> int:
    """Build, check and time; return the exit code."""
    if not torch.cuda.is_available():
        print("no CUDA device; run this on a machine that has one")
        return 2
    torch.manual_seed(int(time.time()))  # new numbers in each run
    device = torch.device("cuda", torch.cuda.current_device())
    start = time.monotonic()
    try:
        arch = build.architecture(torch.cuda.get_device_capability(device))
        kernels = abi.Kernels(build.build(arch))
        kernels.probe(device.index)
    except KernelError as error:
        print(error)
        return 2
    print(f"built for sm_{arch} in {time.monotonic() - start:.1f} s; {clocks()}")
    names = sys.argv[1:]
    start = time.monotonic()
    outcomes = {}
    for kernel in ("hopper", "portable") if arch == "90a" else ("portable",):
        print(f"{kernel} kernel")
        outcome = Checks(kernels, device, kernel == "hopper").run(names)
        outcomes[kernel] = outcome
        for claim, count in outcome.counts.items():
            print(f"  {count:>5} x {claim}")
        for failure in outcome.failures[:20]:
            print(f"FAILED {failure}")
        print(f"{len(outcome.failures)} failures, {time.monotonic() - start:.1f} s")
    table = [] if names else measure(kernels)
    print(clocks())
    if "OUT" in os.environ:
        figures = {
            "device": torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "checks": {name: found.counts for name, found in outcomes.items()},
            "failures": {name: found.failures for name, found in outcomes.items()},
            "timing": table,
        }
        path = Path(os.environ["OUT"]) / "w6a8.json"
        path.write_text(json.dumps(figures, indent=1))
    return 1 if any(found.failures for found in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
