"""Prune MLP neurons with optipfair, in an environment of its own.

    python optipfair_prune.py MODEL OUT --method MAW --sparsity 0.1 0.2 [--tokens FILE]

One checkpoint for each sparsity, ``OUT/METHOD-PERCENT``, and ``peer.json`` in it. The
package scores a neuron by its weights alone (``MAW``, ``VOW``, ``PON``, ``L2``), or,
where FILE is given (safetensors with int64 ``tokens`` ``[N, T]``), by its data-driven
variant of MAW: the range of all three matrices times the norm of the activation, which
it sums over batches. All blocks keep the same number of neurons, and nothing repairs
the rest.

The package needs neither its own torch nor other libraries: ``pip install --no-deps
optipfair==0.4.2`` on top of an environment that has torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from optipfair import prune_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8


def batches_of(tokens: Tensor | None) -> list[dict[str, Tensor]] | None:
    """Return what the package takes as its data: batches of 8 windows."""
    if tokens is None:
        return None
    return [{"input_ids": rows} for rows in tokens.split(BATCH)]


def pruned(
    model: Path, method: str, sparsity: float, tokens: Tensor | None, device: str
) -> Any:
    """Return a float32 model without ``sparsity`` of the neurons of each block."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return prune_model(
        dense.to(device),
        pruning_type="MLP_GLU",
        neuron_selection_method=method,
        pruning_percentage=100 * sparsity,
        dataloader=batches_of(tokens),
        show_progress=False,
    )


def main() -> None:
    """Write a pruned checkpoint for each sparsity."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=("MAW", "VOW", "PON", "L2"), default="MAW")
    parser.add_argument("--sparsity", type=float, nargs="+", required=True)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    tokens = arguments.tokens and load_file(arguments.tokens)["tokens"]
    label = arguments.method + ("-data" if arguments.tokens else "")
    for sparsity in arguments.sparsity:
        started = time.perf_counter()
        model = pruned(
            arguments.model, arguments.method, sparsity, tokens, arguments.device
        )
        seconds = time.perf_counter() - started
        folder = arguments.out / f"{label}-{round(100 * sparsity)}"
        model.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(arguments.model).save_pretrained(folder)
        figures = {
            "tool": f"optipfair {version('optipfair')}",
            "method": label,
            "sparsity": sparsity,
            "tokens": 0 if tokens is None else tokens.numel(),
            "seconds": round(seconds, 2),
        }
        (folder / "peer.json").write_text(json.dumps(figures, indent=1))
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
