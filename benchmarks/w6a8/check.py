"""Is every W6A8 kernel exact on this GPU? One command, under a minute.

    python benchmarks/w6a8/check.py            all of it
    python benchmarks/w6a8/check.py inputs sums     only these checks, no result
    compute-sanitizer python benchmarks/w6a8/check.py inputs "bad inputs"

Needs torch with CUDA, and nvcc. Ends with 1 if a check fails.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import torch  # noqa: E402
from exactness import Checks, Outcome  # noqa: E402
from results import PACKAGES, write_result  # noqa: E402

from compress.core.errors import KernelError  # noqa: E402
from compress.runtime.w6a8 import abi, build  # noqa: E402
from compress.runtime.w6a8.abi import Kernel  # noqa: E402

KERNELS: tuple[Kernel, ...] = ("few", "hopper", "portable")

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
    seed = int(time.time())  # new numbers in each run
    torch.manual_seed(seed)
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
    outcomes: dict[Kernel, Outcome] = {}
    for kernel in KERNELS if arch == "90a" else KERNELS[-1:]:
        print(f"{kernel} kernel")
        outcome = Checks(kernels, device, kernel).run(names)
        outcomes[kernel] = outcome
        for claim, count in outcome.counts.items():
            print(f"  {count:>5} x {claim}")
        for failure in outcome.failures[:20]:
            print(f"FAILED {failure}")
        print(f"{len(outcome.failures)} failures, {time.monotonic() - start:.1f} s")
    print(clocks())
    failures = sum(len(found.failures) for found in outcomes.values())
    if not names:
        save(outcomes, seed)
    return 1 if failures else 0


def save(outcomes: dict[Kernel, Outcome], seed: int) -> None:
    """Write the result."""
    claims = list(dict.fromkeys(name for o in outcomes.values() for name in o.counts))
    print(
        write_result(
            "w6a8_exactness",
            claim="The W6A8 kernels beside the plain formula in torch, on the device "
            "itself: checks that were made, for each kernel, and how many failed. "
            "Results may be two units in the last place and 1e-5 of the sum of "
            "magnitudes off; sums, codes and repeated calls not at all.",
            figures={
                "Checks": [
                    {"check": claim}
                    | {
                        name: found.counts.get(claim)
                        for name, found in outcomes.items()
                    }
                    for claim in claims
                ],
                "failures": sum(len(found.failures) for found in outcomes.values()),
            },
            seed=seed,
            versions=PACKAGES,
            raw={name: found.failures for name, found in outcomes.items()},
        )
    )


if __name__ == "__main__":
    sys.exit(main())
