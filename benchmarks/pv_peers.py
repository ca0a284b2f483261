"""Other tools at two and three bits, on the texts and windows of ``pv_tuning.py``.

    python benchmarks/pv_peers.py --tokens mix.npy
    python benchmarks/peers/autoround_quantize.py MODEL mix.npy \
        PEERS/autoround-int3 --bits 3
    python benchmarks/peers/gptqmodel_quantize.py MODEL mix.npy \
        PEERS/gptqmodel-int3 --bits 3
    python benchmarks/peers/hqq_reference.py MODEL PEERS/hqq-int3 --bits 3
    python benchmarks/pv_peers.py PEERS [--device cuda]

MODEL is ``permuted`` of ``offgrid.py``. Every folder of PEERS holds a dense checkpoint
of what a tool has stored, and ``peer.json``. ``--tokens`` writes windows of the bundled
mix for tools that calibrate, 128 x 512. Rows that the result has are kept, so that
tools may run on different machines.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy
from pv_tuning import TEXTS, device_name, measured_texts
from results import FOLDER, write_result

from compress.calibration.data import load_tokens
from compress.evaluation.measure import evaluate_candidates
from compress.log import set_up_logging
from compress.model.loading import ModelHandle, open_model
from compress.model.streaming import StreamedModel

SAMPLES, LENGTH, WINDOWS = 128, 512, 16
NAME = "pv_peers"


def main() -> None:
    """Write tokens, or measure what tools have made of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peers", type=Path, nargs="?")
    parser.add_argument("--tokens", type=Path)
    parser.add_argument(
        "--model", type=Path, default=Path("runs/benchmarks/offgrid/permuted")
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/pv_peers"))
    options = parser.parse_args()
    set_up_logging()
    base = open_model(str(options.model), cache=options.work / "cache")
    if options.tokens:
        found = load_tokens(
            "mix", base.tokenizer(), samples=SAMPLES, sequence_length=LENGTH, seed=0
        )
        numpy.save(options.tokens, found.tokens.numpy())
    if options.peers:
        measure(base, options)


def measure(base: ModelHandle, options: Any) -> None:
    """Write a row for each folder."""
    folders = sorted(path.parent for path in options.peers.glob("*/peer.json"))
    handles = {
        f.name: open_model(str(f), cache=options.work / "cache") for f in folders
    }
    _, figures = evaluate_candidates(
        measured_texts(base, WINDOWS),
        streamed(base, options.device).logits,
        {name: streamed(h, options.device).logits for name, h in handles.items()},
        hidden_size=int(base.description.config["hidden_size"]),
    )
    known = FOLDER / f"{NAME}.json"
    rows = {}
    if known.exists():
        kept = json.loads(known.read_text("utf-8"))["figures"]["Peers"]
        rows = {row["model"]: row for row in kept}
    for folder in folders:
        about = json.loads((folder / "peer.json").read_text("utf-8"))
        row = {"model": folder.name, "tool": about["tool"]}
        row["tokens"] = math.prod(about.get("tokens", [0]))
        for kind, key in (("KL", "kl"), ("perplexity", "perplexity")):
            row |= {f"{kind} {t}": figures[folder.name][t][key] for t in TEXTS}
        row |= {"seconds": about["seconds"], "on": device_name(options.device)}
        rows[folder.name] = row
        print(row, flush=True)
    write_result(
        NAME,
        claim="SmolLM2-135M (permuted), all decoder linears at two and three bits by "
        f"other tools: KL to bf16 in nats and perplexity, {WINDOWS} windows of "
        f"{LENGTH} tokens a text, as in pv_tuning.json.",
        figures={"Peers": [rows[name] for name in sorted(rows)]},
    )


def streamed(handle: ModelHandle, device: str) -> StreamedModel:
    """Return a model block by block."""
    return StreamedModel(handle.description, handle.source, device=device)


if __name__ == "__main__":
    main()
