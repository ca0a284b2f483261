"""Quantize a model with llm-compressor, in an environment of its own.

    python llmcompressor_oneshot.py MODEL TOKENS.npy OUT [--recipe gptq-int4]

Every linear layer of the decoder; modifiers at their defaults (GPTQ: static act-order,
dampening 0.01, block 128). TOKENS holds int64 ``[N, T]``. OUT receives an ordinary
float32 checkpoint of the dequantized weights, so that the measurement adds no rounding
of its own (activations are rounded by the measurement, alike for all tools), and
``peer.json``: seconds of the call to ``oneshot`` and the peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPES = (
    *("gptq-int4", "awq-int4", "awq-gptq-int4", "rtn-int4", "gptq-w8a8"),
    *("rtn-fp8", "rtn-nvfp4", "gptq-nvfp4", "rtn-mxfp4", "gptq-mxfp4"),
)
PRESETS = {
    "w8a8": "W8A8",
    "fp8": "FP8_DYNAMIC",
    "nvfp4": "NVFP4A16",
    "mxfp4": "MXFP4A16",
}


def modifiers_of(recipe: str, group_size: int) -> list[Any]:
    """Return the modifiers of a recipe: transforms first, then how codes are made."""
    *methods, kind = recipe.split("-")
    if kind in PRESETS:
        what: dict[str, Any] = {"scheme": PRESETS[kind], "targets": ["Linear"]}
    else:
        weights = QuantizationArgs(
            num_bits=4,
            type="int",
            symmetric=True,
            strategy="group",
            group_size=group_size,
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        what = {"config_groups": {"group_0": scheme}}
    last = GPTQModifier if "gptq" in methods else QuantizationModifier
    chosen: list[Any] = [last(ignore=["lm_head"], **what)]
    if "awq" in methods:
        chosen.insert(0, AWQModifier(duo_scaling="both"))
    if kind == "w8a8":
        chosen.insert(0, SmoothQuantModifier(smoothing_strength=0.8))
    return chosen


def quantize_(model: Any, tokens: numpy.ndarray, recipe: list[Any]) -> float:
    """Apply the modifiers to ``model`` in place and return the seconds it took."""
    rows = Dataset.from_dict(
        {
            "input_ids": tokens.tolist(),
            "attention_mask": numpy.ones_like(tokens).tolist(),
        }
    )
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=rows,
        recipe=recipe,
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
    )
    return time.perf_counter() - start


def dequantized_state(model: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Return float32 tensors by the dense model's names, and how many were coded."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    coded = 0
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        coded += 1
        state[f"{name}.weight"] = fake_quantize(
            x=module.weight,
            scale=module.weight_scale,
            zero_point=getattr(module, "weight_zero_point", None),
            args=scheme.weights,
            global_scale=getattr(module, "weight_global_scale", None),
        )
    return {k: v.detach().float().cpu() for k, v in state.items()}, coded


def main() -> None:
    """Quantize, put the result into a fresh dense model and save that."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", choices=RECIPES, default="gptq-int4")
    parser.add_argument("--group-size", type=int, default=64)
    arguments = parser.parse_args()

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.float32
        )

    if not torch.cuda.is_available():
        # llm-compressor 0.14 pins AWQ's cached inputs, which fails without a device.
        IntermediatesCache._pin_intermediate = staticmethod(lambda value: None)
    model = load()
    tokens = numpy.load(arguments.tokens)
    recipe = modifiers_of(arguments.recipe, arguments.group_size)
    seconds = quantize_(model, tokens, recipe)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    state, coded = dequantized_state(model)
    dense = load()
    names = dense.state_dict().keys()
    dense.load_state_dict({name: state[name] for name in names})
    dense.save_pretrained(arguments.out)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.out)
    figures = {
        "tool": f"llm-compressor {version('llmcompressor')}",
        "seconds": seconds,
        "peak_memory_bytes": peak_bytes,
        "layers": coded,
        "tokens": int(tokens.size),
        "recipe": arguments.recipe,
        "versions": {
            name: version(name)
            for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")
        },
    }
    (arguments.out / "peer.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
