"""Quantize a model with the `hqq` package, in an environment of its own.

    python hqq_reference.py MODEL OUT --bits 4 [--group-size 64] [--axis 1] [--slow]

Every linear layer of the decoder goes through ``hqq.core.quantize.Quantizer`` at its
defaults (half-quadratic, p = 0.7, 20 rounds, float zero points and scales). ``--axis
1`` groups columns of a row, as all our schemes do; ``--axis 0`` is the package's other
layout. ``--slow`` takes its slower solver of 100 rounds. OUT receives a float32
checkpoint of the dequantized weights, with scales and zero points rounded to float16
as they are stored, and ``peer.json``: seconds and relative squared error.

The package needs neither its kernels nor another torch: ``pip install --no-deps
hqq==0.2.8.post1 termcolor`` on top of an environment that has torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from hqq.core.optimize import optimize_weights_proximal_slow
from hqq.core.quantize import Quantizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def reconstruct(weight: Tensor, bits: int, group_size: int, axis: int) -> Tensor:
    """Return float32 ``[R, C]``: what the package stores for ``weight``, decoded."""
    codes, meta = Quantizer.quantize(
        weight,
        nbits=bits,
        group_size=group_size,
        axis=axis,
        bitpack=False,
        device=str(weight.device),
    )
    scale, zero = meta["scale"].half().float(), meta["zero"].half().float()
    return ((codes.float() - zero) * scale).reshape(weight.shape)


@torch.no_grad()
def main() -> None:
    """Quantize all linear layers of the decoder and save the dense result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--axis", type=int, default=1)
    parser.add_argument("--slow", action="store_true")
    arguments = parser.parse_args()
    if arguments.slow:
        Quantizer.optimize_weights = optimize_weights_proximal_slow
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    lost = total = seconds = 0.0
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            weight, start = module.weight.data, time.perf_counter()
            values = reconstruct(
                weight, arguments.bits, arguments.group_size, arguments.axis
            )
            seconds += time.perf_counter() - start
            lost += float((values - weight).square().sum())
            total += float(weight.square().sum())
            module.weight.data = values
    model.save_pretrained(arguments.out)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.out)
    try:
        package = version("hqq")
    except PackageNotFoundError:
        package = "unpacked"
    figures = {
        "tool": f"hqq {package}",
        "relative_error": lost / total,
        "seconds": seconds,
    }
    (arguments.out / "peer.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
