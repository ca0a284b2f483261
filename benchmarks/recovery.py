"""Perplexity and KL of a pruned model before and after recovery.

    python benchmarks/recovery.py MODEL --student PRUNED --device cuda \
        --variant minutes=10,train=full,batch=32,generated=8192

Each ``--variant`` sets options of ``recover`` (see docs/config.md) and is a run of its
own, from the same student. Without ``--student`` one is made by the plainest rule: the
fifth of each block's neurons whose ``down_proj`` column is smallest is dropped, and
nothing is repaired. Test texts are no part of what is trained on.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from results import write_result
from safetensors.torch import load_file, save_file

from compress.config import parse_options
from compress.config.recover_section import RECOVERIES
from compress.evaluation.measure import evaluate_candidates, prepare_texts
from compress.log import set_up_logging
from compress.model.loading import ModelHandle, open_model
from compress.model.streaming import StreamedModel
from compress.recovery.recover import recover
from compress.recovery.text import load_recovery_text

TEXTS = ("wikitext2", "tales", "code")


def main() -> None:
    """Recover once for each variant and write the figures."""
    arguments = parsed()
    set_up_logging()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    student = arguments.student or without_a_fifth(arguments.model, work / "student")
    teacher = opened(arguments.model, work)
    data = arguments.data
    if data.startswith("["):
        data = json.loads(data)
    figures = {"pruned": student}
    records = {}
    for number, variant in enumerate(arguments.variant):
        given = parse_options(variant.split(","))
        method = given.pop("method", "distill")
        options = RECOVERIES[method].model_validate(given)
        text = load_recovery_text(data, teacher.tokenizer(), options)
        target = work / f"recovered-{number}"
        records[variant] = recover(
            opened(student, work),
            teacher,
            target,
            text=text,
            options=options,
            device=arguments.device,
            state=work / f"state-{number}",
        )
        print(json.dumps(records[variant], indent=1), flush=True)
        if method == "distill":
            figures[variant] = target
    rows = [
        row
        for count in arguments.windows
        for row in measured(arguments, teacher, figures, count)
    ]
    for row in rows:
        print(row)
    facts = ("steps", "seconds", "tokens", "kl_before", "kl_after", "best_step")
    training = [
        {"variant": variant}
        | {key: record[key] for key in facts}
        | {"peak memory (MB)": round(record["peak_memory_bytes"] / 1e6)}
        for variant, record in records.items()
    ]
    write_result(
        arguments.name,
        claim="How much of what pruning took do minutes of training give back?",
        figures={"on test text": rows, "training": training},
        raw=records,
    )


def parsed() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--student", type=Path)
    parser.add_argument("--variant", action="append", required=True)
    parser.add_argument("--data", default="mix", help="or a list of sources, JSON")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/recovery"))
    parser.add_argument("--name", default="recovery")
    return parser.parse_args()


def opened(folder: Path, work: Path) -> ModelHandle:
    """Return a model that is not loaded yet."""
    return open_model(str(folder), cache=work / "cache")


def without_a_fifth(model: Path, target: Path) -> Path:
    """Drop the neurons of each block with the smallest columns of ``down_proj``."""
    tensors = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text("utf-8"))
    keep = round(0.8 * config["intermediate_size"] / 32) * 32
    for block in range(config["num_hidden_layers"]):
        mlp = f"model.layers.{block}.mlp"
        down = tensors[f"{mlp}.down_proj.weight"]
        kept = down.float().norm(dim=0).topk(keep).indices.sort().values
        tensors[f"{mlp}.down_proj.weight"] = down[:, kept].contiguous()
        for name in (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"):
            tensors[name] = tensors[name][kept].contiguous()
    shutil.copytree(model, target, dirs_exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config["intermediate_size"] = keep
    (target / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    return target


def measured(
    arguments: argparse.Namespace,
    teacher: ModelHandle,
    folders: Mapping[str, Path],
    count: int,
) -> list[dict[str, Any]]:
    """Return a row for each model, on so many windows of each text."""
    texts = prepare_texts(
        TEXTS,
        teacher.tokenizer(),
        protocol="windows",
        count=count,
        length=arguments.length,
    )

    def streamed(handle: ModelHandle) -> StreamedModel:
        return StreamedModel(handle.description, handle.source, device=arguments.device)

    base, others = evaluate_candidates(
        texts,
        streamed(teacher).logits,
        {n: streamed(opened(f, arguments.work)).logits for n, f in folders.items()},
        hidden_size=int(teacher.description.config["hidden_size"]),
    )
    rows: list[dict[str, Any]] = []
    for name, figures in {"original": base, **others}.items():
        row: dict[str, Any] = {"model": name, "windows": count}
        for text in TEXTS:
            own = figures[text]
            row[f"{text} perplexity"] = round(own["perplexity"], 3)
            rise = own["perplexity"] / base[text]["perplexity"] - 1
            row[f"{text} rise (%)"] = round(100 * rise, 1)
            row[f"{text} KL"] = round(own.get("kl", 0.0), 4)
        rows.append(row)
    return rows


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main()
