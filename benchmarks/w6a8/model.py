"""A Llama of known shape with random weights: bf16, W8A8 and W6A8 end to end.

    python benchmarks/w6a8/model.py [--model random:llama-2-7b]

What ``compress bench model`` measures, with fewer repetitions and in one process:
static cache, CUDA graphs, decoding at batch 1, 8 and 32 and a prompt of 2048 tokens.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from results import PACKAGES, write_result

from compress.bench.model import ModelSettings, bench_model


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="random:llama-2-7b")
    options = parser.parse_args()
    settings = ModelSettings.for_device(Path(options.model), "cuda", quick=True)
    settings = replace(settings, batches=(1, 8, 32), idle_seconds=1.0)
    found = bench_model(settings, apart=False, say=lambda text: print(text, flush=True))
    print(
        write_result(
            "w6a8_model",
            claim=f"{options.model} on one GPU: decoding and reading a prompt of "
            f"{settings.prefill_tokens} tokens, dense in bfloat16, in W8A8 by torch's "
            "integer product, and in W6A8 by our kernels with layers fused; embedding "
            "and head stay in bfloat16. Static cache, CUDA graphs, "
            f"{settings.context_tokens} tokens of context.",
            figures={
                "Ways": [line_of(way) for way in found["ways"]],
                "Over dense": [
                    {"way": name} | flat(ratios)
                    for name, ratios in found.get("over_dense", {}).items()
                ],
            },
            versions=PACKAGES,
            raw=found,
        )
    )


def line_of(way: dict[str, Any]) -> dict[str, Any]:
    """Return one line of the table."""
    line = {
        "way": way["label"],
        "weights GB": way["weights_bytes"] / 1e9,
        "prefill tokens/s": way["prefill"].get("tok_s"),
    }
    for request in way["requests"]:
        line[f"tokens/s, batch {request['batch']}"] = request.get("it_tok_s")
    first = way["requests"][0]
    return line | {
        "J/token, batch 1": first.get("j_per_token"),
        "peak GB, batch 1": (first.get("peak_gb") or {}).get("allocated"),
    }


def flat(ratios: dict[str, Any]) -> dict[str, Any]:
    """Return ratios without levels below."""
    speeds = ratios.pop("it_tok_s")
    return ratios | {f"decode, batch {size}": ratio for size, ratio in speeds.items()}


if __name__ == "__main__":
    main()
