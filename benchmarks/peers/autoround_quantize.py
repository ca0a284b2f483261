"""Quantize a model with Intel's AutoRound, in an environment of its own.

    python autoround_quantize.py MODEL TOKENS.npy OUT --bits 3 [--group-size 64]

Every linear layer of the decoder, symmetric codes, AutoRound's defaults (200 steps of
signed gradient descent a block, batches of 8). TOKENS holds int64 ``[N, T]``. OUT
receives an ordinary float32 checkpoint of the dequantized weights, and ``peer.json``:
version, seconds and options.

``pip install --no-deps auto-round==0.16.1 py-cpuinfo`` on top of an environment that
has torch and transformers.
"""

from __future__ import annotations

import time

import numpy
import torch
from auto_round import AutoRound
from calibrated import command_line, write_about
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Quantize, and save the dense result."""
    parser = command_line(__doc__)
    parser.add_argument("--iters", type=int, default=200)
    arguments = parser.parse_args()
    tokens = torch.from_numpy(numpy.load(arguments.tokens))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    rows = [{"input_ids": row[None]} for row in tokens]
    began = time.monotonic()
    rounder = AutoRound(
        model,
        tokenizer,
        scheme={
            "bits": arguments.bits,
            "group_size": arguments.group_size,
            "sym": True,
            "data_type": "int",
            "act_bits": 16,
        },
        dataset=rows,
        iters=arguments.iters,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        device_map=arguments.device,
        enable_torch_compile=False,
    )
    quantized, _ = rounder.quantize()
    seconds = time.monotonic() - began
    quantized.float().save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    write_about(
        arguments,
        "auto-round",
        tokens=tokens.shape,
        seconds=seconds,
        iters=arguments.iters,
    )


if __name__ == "__main__":
    main()
