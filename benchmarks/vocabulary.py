"""The vocabulary matrix alone in few bits: product quantization, integers, plain VQ.

    python benchmarks/vocabulary.py --model DIR [--windows 4] [--samples 64]

Only embedding and head (one matrix, if they are tied) change; the decoder stays as it
is. KL to the model and perplexity are measured by plain transformers in float32, as
``measure_models.py`` does it. Bytes are those of the stored tensors of the matrix in a
``palette`` folder, tables included.

``plain VQ`` is the form of VQ-Logits without training, the negative control: one table
of V / 16 whole rows, so that all tokens of a cluster have one logit. Statistics of the
calibration text and finished rows are kept in the work folder, and not made again.

The second table times the logits of one token: the dense product, decoding first, and
looking up (``table_logits``); codes are random, of which the time does not depend.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure_models import Ruler
from reference_kl import LENGTH, TEXTS, load
from results import write_result
from torch import Tensor

from compress import registry
from compress.calibration import ends
from compress.calibration.data import load_tokens
from compress.core import palette_format, product
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.core.table_products import products
from compress.core.tensors import QuantizedTensor
from compress.model.loading import ModelHandle, open_model
from compress.model.streaming import StreamedModel

SEED, CALIBRATION = 0, 512
UNWEIGHTED = {"sensitivity": "none"}
RUNS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("rtn", "int8-g64", {}),
    ("rtn", "int4-g64", {}),
    ("gptq", "int4-g64", {}),
    ("gptq", "int2-g64", {}),
    ("pq", "pq-2x8", {}),
    ("pq", "pq-4x8", UNWEIGHTED),
    ("pq", "pq-4x8", {}),
    ("pq", "pq-8x8x2", {}),
    ("pq", "pq-8x8", UNWEIGHTED),
    ("pq", "pq-8x8", {}),
)
TIMED = ("pq-4x8", "pq-8x8x2", "pq-8x8")
PLAIN, LLOYD = 16, 8  # tokens of a cluster on average, and rounds of k-means


def main() -> None:
    """Measure all rows and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/vocabulary"))
    parser.add_argument("--windows", type=int, default=4, help="of each text")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    handle = open_model(str(arguments.model), cache=arguments.work)
    if not handle.description.tied:
        parser.error(f"{arguments.model} has a head of its own; use a tied model")
    statistics = statistics_of(handle, arguments.samples, arguments.work)
    model = load(arguments.model)
    embedding = model.get_input_embeddings()
    weight = embedding.weight.data.clone()
    ruler = Ruler.of(
        model,
        handle.tokenizer(),
        arguments.work,
        windows=arguments.windows,
        device="cpu",
    )
    rows: list[dict[str, Any]] = []

    def add(method: str, scheme: str, make: Callable[[], tuple[Tensor, int]]) -> None:
        path = arguments.work / f"{method} {scheme}.json".replace("/", " by ")
        if not path.exists():
            started = time.perf_counter()
            values, size = make()
            seconds = time.perf_counter() - started
            embedding.weight.data.copy_(values)
            line = row(method, scheme, size, seconds, weight, ruler.measure(model))
            path.write_text(json.dumps(line))
        rows.append(json.loads(path.read_text()))
        print(rows[-1], flush=True)

    add("bf16", "", lambda: (weight, 2 * weight.numel()))
    for method, name, options in RUNS:
        label = f"{method}, plain errors" if options else method

        def make(
            method: str = method, name: str = name, options: dict[str, Any] = options
        ) -> tuple[Tensor, int]:
            coded = quantized(method, name, options, weight, statistics)
            return coded.dequantize(), stored_bytes(coded)

        add(label, name, make)
    add("plain VQ", f"V/{PLAIN} rows", lambda: plain_vq(weight, statistics))
    path = write_result(
        "vocabulary",
        claim="Only the vocabulary matrix (49,152 x 576, tied) of SmolLM2-135M is "
        "compressed: KL to bf16 in nats and perplexity, "
        f"{arguments.windows} windows of {LENGTH} tokens a text; calibration "
        f"{arguments.samples} x {CALIBRATION} tokens of the bundled mix. Plain VQ is a "
        "negative control.",
        figures={"Quality": rows, "Logits of one token": timed(weight)},
        seed=SEED,
    )
    print(path)


def statistics_of(handle: ModelHandle, samples: int, work: Path) -> LayerStatistics:
    """Return the statistics of the tied matrix, from the work folder if they are."""
    path = work / f"statistics-{samples}.pt"
    if not path.exists():
        windows = load_tokens(
            "mix",
            handle.tokenizer(),
            samples=samples,
            sequence_length=CALIBRATION,
            seed=SEED,
        ).tokens
        streamed = StreamedModel(
            handle.description, handle.source, device="cpu", dtype=torch.float32
        )
        found = ends.embedding_statistics(streamed, windows)
        torch.save([found.hessian, found.tokens, found.counts], path)
    hessian, tokens, counts = torch.load(path)
    return LayerStatistics(hessian, tokens, counts=counts)


def quantized(
    method: str,
    name: str,
    options: dict[str, Any],
    weight: Tensor,
    statistics: LayerStatistics,
) -> QuantizedTensor:
    """Return the codes that a run would make of the matrix."""
    kind = registry.get_quantizer(method)
    quantizer = kind(kind.Options.model_validate(options))
    used = statistics if quantizer.needs_statistics else None
    scheme = Scheme.parse(name).with_scales("bfloat16")
    return quantizer.quantize(weight, scheme, used)


def stored_bytes(tensor: QuantizedTensor) -> int:
    """Return the bytes of a matrix in a palette folder."""
    return sum(x.nbytes for x in palette_format.encode(tensor).values())


def plain_vq(weight: Tensor, statistics: LayerStatistics) -> tuple[Tensor, int]:
    """Return the matrix as whole rows of one table, and its bytes.

    K-means from random rows, in the metric of the statistics, damped; codes of ``log2``
    bits, rounded up.
    """
    rows, columns = weight.shape
    count = rows // PLAIN
    hessian = statistics.hessian / statistics.hessian.diagonal().mean()
    cost = hessian + 0.01 * torch.eye(columns)
    weights = torch.ones(rows)
    if statistics.counts is not None:
        weights = statistics.counts.float() + 0.25
    generator = torch.Generator().manual_seed(SEED)
    table = weight[torch.randperm(rows, generator=generator)[:count]]
    for _ in range(LLOYD):
        codes = product.nearest(weight, table, cost)
        table = product.means(weight, codes, weights, table)
        table = product.rounded(table, torch.bfloat16)
    codes = product.nearest(weight, table, cost)
    bits = (count - 1).bit_length()
    return table[codes], 2 * table.numel() + -(-rows * bits // 8)


def row(
    method: str,
    scheme: str,
    size: int,
    seconds: float,
    weight: Tensor,
    figures: dict[str, Any],
) -> dict[str, Any]:
    """Return one line of the table."""
    line: dict[str, Any] = {
        "method": method,
        "scheme": scheme,
        "bytes": size,
        "bits a weight": round(8 * size / weight.numel(), 3),
    }
    for text in TEXTS:
        line[f"KL {text}"] = figures[text]["kl"]
    line["KL s.e. (largest)"] = max(figures[text]["kl_se"] for text in TEXTS)
    for text in TEXTS:
        line[f"perplexity {text}"] = figures[text]["perplexity"]
    line["seconds"] = round(seconds, 1)
    return line


@torch.no_grad()
def timed(weight: Tensor) -> list[dict[str, Any]]:
    """Return milliseconds of the logits of one token, the best of five."""
    inputs = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0))
    rounded, narrow = weight.bfloat16(), inputs.bfloat16()
    lines: list[dict[str, Any]] = [
        {"matrix": "float32", "how": "dense", "ms": best(lambda: inputs @ weight.T)},
        {"matrix": "bfloat16", "how": "dense", "ms": best(lambda: narrow @ rounded.T)},
    ]
    for name in TIMED:
        tensor = random_codes(name, weight)
        stored, scheme = palette_format.encode(tensor), tensor.scheme
        dense = inputs @ tensor.dequantize().T

        def decoded(
            stored: dict[str, Tensor] = stored, scheme: Scheme = scheme
        ) -> Tensor:
            shape = (weight.shape[0], weight.shape[1])
            values = palette_format.decode_values(
                stored, scheme, shape, dtype=torch.float32
            )
            return inputs @ values.T

        def looked_up(
            stored: dict[str, Tensor] = stored, scheme: Scheme = scheme
        ) -> Tensor:
            return products(inputs, stored, scheme)

        off = (looked_up() - dense).abs().max() / dense.abs().max()
        lines += [
            {"matrix": name, "how": "decoded, then dense", "ms": best(decoded)},
            {
                "matrix": name,
                "how": "looked up",
                "ms": best(looked_up),
                "largest difference, relative": float(off),
            },
        ]
    return lines


def random_codes(name: str, weight: Tensor) -> QuantizedTensor:
    """Return random codes and tables of a matrix's shape."""
    scheme = Scheme.parse(name).with_scales("bfloat16")
    infos = palette_format.tensors(scheme, (weight.shape[0], weight.shape[1]))
    generator = torch.Generator().manual_seed(SEED)
    stored = {
        "codes": torch.randint(
            256, infos["codes"].shape, generator=generator, dtype=torch.uint8
        ),
        "tables": torch.randn(infos["tables"].shape, generator=generator).bfloat16(),
    }
    return palette_format.decode(stored, scheme, (weight.shape[0], weight.shape[1]))


def best(work: Callable[[], Tensor]) -> float:
    """Return milliseconds of the fastest of five calls, after one."""
    work()
    found = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        found.append(1000 * (time.perf_counter() - started))
    return round(min(found), 2)


if __name__ == "__main__":
    main()
