"""Quantize a model with AutoRound, in an environment of its own.

    python autoround_quantize.py MODEL TOKENS.npy OUT --bits 2 [--group-size 64]
                                 [--iters 200] [--device cpu]

Every linear layer of the decoder, symmetric codes, all else at the package's defaults.
TOKENS holds int64 ``[N, T]``; all of them are calibration text. OUT receives a float32
checkpoint of the dequantized weights and ``peer.json``: tool, bits and seconds.

``pip install auto-round==0.16.1`` on top of an environment that has torch and
transformers.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import numpy
import torch
from auto_round import AutoRound
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

_SCALE_BITS = 16


def main() -> None:
    """Quantize all linear layers of the decoder and save the dense result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    tokens = torch.from_numpy(numpy.load(arguments.tokens))
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rounder = AutoRound(
        model,
        tokenizer,
        bits=arguments.bits,
        group_size=arguments.group_size,
        sym=True,
        data_type="int",
        iters=arguments.iters,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=DataLoader(list(tokens), batch_size=8),
        device_map=arguments.device,
    )
    start = time.perf_counter()
    rounded, _ = rounder.quantize()
    seconds = time.perf_counter() - start
    rounded.to("cpu", torch.float32).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    figures = {
        "tool": f"auto-round {version('auto-round')}",
        "iterations": arguments.iters,
        "bits": arguments.bits + _SCALE_BITS / arguments.group_size,
        "seconds": seconds,
    }
    (arguments.out / "peer.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
