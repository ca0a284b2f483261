"""Quantize a model with GPTQModel, in an environment of its own.

    GPTQMODEL_CPU_WORKERS=2 python gptqmodel_quantize.py MODEL TOKENS.npy OUT --bits 3 \
        [--group-size 64]

Every linear layer of the decoder, symmetric codes, GPTQModel's defaults. TOKENS holds
int64 ``[N, T]``. OUT receives an ordinary float32 checkpoint of what GPTQModel reads
back from its packed one, and ``peer.json``: version, seconds and options.

``BUILD_CUDA_EXT=0 pip install --no-deps gptqmodel==7.7.0 device-smi tokenicer logbar
pypcre threadpoolctl defuser torchao datasets dill multiprocess xxhash pandas pyarrow
protobuf pillow`` on top of an environment that has torch and transformers.
"""

from __future__ import annotations

import tempfile
import time

import numpy
import torch
from calibrated import command_line, write_about
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 4


def main() -> None:
    """Quantize, read what was packed, and save it dense."""
    arguments = command_line(__doc__).parse_args()
    tokens = numpy.load(arguments.tokens)
    rows = [{"input_ids": r.tolist(), "attention_mask": [1] * len(r)} for r in tokens]
    config = QuantizeConfig(
        bits=arguments.bits,
        group_size=arguments.group_size,
        sym=True,
        device=arguments.device,
    )
    model = GPTQModel.load(str(arguments.model), config)
    began = time.monotonic()
    model.quantize(rows, batch_size=BATCH)
    seconds = time.monotonic() - began
    with tempfile.TemporaryDirectory() as packed:
        model.save(packed)
        weights = dense_weights(packed, arguments.device)
    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in weights.items():
            dense.get_submodule(name).weight.copy_(weight)
    dense.save_pretrained(arguments.out)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.out)
    write_about(
        arguments,
        "gptqmodel",
        tokens=tokens.shape,
        seconds=seconds,
        layers=len(weights),
    )


def dense_weights(packed: str, device: str) -> dict[str, torch.Tensor]:
    """Return float32 ``[R, C]`` of each quantized layer of a checkpoint, by name."""
    model = GPTQModel.load(packed, backend=BACKEND.TORCH, device=device)
    layers = {
        name: module
        for name, module in model.model.named_modules()
        if hasattr(module, "dequantize_weight")
    }
    return {
        name: module.dequantize_weight().float().cpu().T.contiguous()
        for name, module in layers.items()
    }


if __name__ == "__main__":
    main()
