"""What rounding activations costs on top of 6-bit weights: the order of FlexQ.

    python benchmarks/activations.py MODEL [--group-size 64] [--windows 4] [--only a16]

Weights are rounded to nearest in 6 bits, as FlexQ's are, and measured with inputs of
8, 6 and 4 bits, with a scale a token or a scale for each group of a token. ``flexq`` is
the mix of its released code for Llama: 8-bit inputs for ``down_proj``, 6-bit for the
rest, in groups. Prints a line for each, and the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from compress.core.plan import LayerPlan, Plan
from compress.core.scheme import InputScheme, Scheme
from compress.evaluation.measure import evaluate_candidates, prepare_texts
from compress.evaluation.rounding import rounding_of
from compress.model.loading import ModelHandle, open_model
from compress.model.streaming import StreamedModel
from compress.quantizers.rtn import RoundToNearest
from compress.transform import CompressedSource


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
    """Print the table, and the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--text", action="append", help="default: wikitext2 and code")
    parser.add_argument("--only", action="append", help="choices, such as 'a8 token'")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        handle = open_model(str(arguments.model), cache=Path(cache))
        texts = prepare_texts(
            arguments.text or ["wikitext2", "code"],
            handle.tokenizer(),
            protocol="windows",
            count=arguments.windows,
            length=arguments.sequence_length,
        )
        base = StreamedModel(handle.description, handle.source)
        source = rounded_source(handle, arguments.group_size)
        names = handle.description.linears()
        models = {
            label: base.with_source(source, rounding=rounding_of(inputs, {}))
            for label, inputs in choices(names, arguments.group_size).items()
            if arguments.only is None or label in arguments.only
        }
        _, found = evaluate_candidates(
            texts,
            partial(base.logits, name="base"),
            {label: partial(m.logits, name=label) for label, m in models.items()},
            hidden_size=int(handle.description.config["hidden_size"]),
        )
    for label, figures in found.items():
        for text, row in figures.items():
            print(
                f"{label:12} {text:10} KL {row['kl']:.5f} +- {row['kl_se']:.5f}  "
                f"perplexity x{row['ppl_ratio']:.4f}  top-1 {row['top1']:.1%}"
            )
    print(json.dumps({"seconds": time.perf_counter() - started, "figures": found}))


if __name__ == "__main__":
    main()
