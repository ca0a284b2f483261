"""A policy of RAMP trained on one model and applied to others without training.

    python benchmarks/allocators_transfer.py --device cuda [--budgets 3.5] [--seeds 0,1]

Trained on ``rotated`` of ``offgrid.py`` with every third block left out (20 of 30);
applied to all of it, and to a Qwen 3 of another width and depth. There is no text to
train one on: its weights are random, as its config draws them, so that it shows whether
a policy carries over in form, and no more. ``v1`` are the paper's features, which look
at no loss that was measured on the model; ``v2`` adds predicted losses. What a policy
asks for is made to fit by predicted losses, and ``greedy`` is what these give alone;
"on errors" both have the error of the layer's weights in their place, so that nothing
of the target is known but its layers one by one. A policy that asks for more than
`greedy` of every layer ends at `greedy`: the bits that it asked for tell.

Policies are kept in ``--work`` and not trained again.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import allocators
import torch
from allocation_case import Case, Settings
from reference_kl import TEXTS
from results import PACKAGES, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from compress import registry
from compress.allocators.ramp.training import asked
from compress.core.allocation import Unit

FEATURES = ("v1", "v2")
MEASURED_NOTHING = ("uniform", "greedy", "ilp")
QWEN: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
Key = tuple[float, str, int]


def thinned(model: Path, out: Path) -> Path:
    """Save a model without every third block, the first and last kept; return where."""
    if not (out / "config.json").is_file():
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        blocks = whole.model.layers
        kept = [i for i in range(len(blocks)) if i % 3 != 1 or i == len(blocks) - 1]
        whole.model.layers = torch.nn.ModuleList(blocks[i] for i in kept)
        whole.config.num_hidden_layers = len(kept)
        _save(whole, model, out)
    return out


def other_architecture(model: Path, out: Path) -> Path:
    """Save a random Qwen 3 with the tokenizer of a model; return where."""
    if not (out / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(model)
        ends = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        torch.manual_seed(0)
        config = Qwen3Config(vocab_size=len(tokenizer), **QWEN, **ends)
        random = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        _save(random, model, out)
    return out


def _save(made: Any, tokenizer_of: Path, out: Path) -> None:
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(out)
    made.save_pretrained(out)


def folder_of(work: Path, model: str, key: Key, evaluations: int) -> Path:
    """Return where a policy is kept."""
    bits, features, seed = key
    name = f"{model}-{bits}-{features}-{seed}-{evaluations}"
    return work / "policies" / name


def train_here(key: Key, evaluations: int) -> Key:
    """Train a policy in a worker process of :mod:`allocators`."""
    case = allocators._case
    bits, features, seed = key
    ramp = registry.get_allocator("ramp")
    settings = case.settings
    given = dict(allocators.options_of("ramp", evaluations))
    given["features"] = features
    given["save_policy"] = folder_of(
        settings.work, settings.model.name, key, evaluations
    )
    options = ramp.Options.model_validate(given)
    ramp(options).allocate(case.problem(bits, seed))
    return key


def train(
    settings: Settings, keys: list[Key], *, evaluations: int, workers: int, threads: int
) -> None:
    """Train the policies that are not kept yet."""
    Case(settings)  # makes the levels, once
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(keys)),
        context,
        initializer=allocators.begin,
        initargs=(settings, threads),
    ) as pool:
        pending = [pool.submit(train_here, key, evaluations) for key in keys]
        for future in pending:
            print("trained", future.result(), flush=True)


def rows_of(
    case: Case, label: str, trained: dict[Key, Path], budgets: list[float]
) -> list[dict[str, Any]]:
    """Return the lines of one target: allocators on predicted losses, then policies."""
    rows = []
    for bits in budgets:
        for name in MEASURED_NOTHING:
            rows.append(_row(case, label, name, bits, [_chosen(case, name, bits)]))
        greedy = _chosen(case, "greedy", bits, on_errors=True)
        rows.append(_row(case, label, "greedy on errors", bits, [greedy]))
        for features, on_errors in (("v1", True), ("v1", False), ("v2", False)):
            mine = [p for k, p in trained.items() if k[:2] == (bits, features)]
            found = [
                _chosen(case, "ramp", bits, on_errors=on_errors, policy=policy)
                for policy in mine
            ]
            name = f"policy {features}{' on errors' if on_errors else ''}"
            rows.append(_row(case, label, name, bits, found))
            wished = [asked(case.problem(bits, 0), policy) for policy in mine]
            rows[-1]["asked bits"] = mean(map(case.bits, wished))
    return rows


def _chosen(
    case: Case, name: str, bits: float, *, on_errors: bool = False, **options: Any
) -> tuple[int, ...]:
    plugin = registry.get_allocator(name)
    problem = case.problem(bits, 0)
    if on_errors:
        problem = replace(problem, units=tuple(map(_on_errors, problem.units)))
    found = plugin(plugin.Options(**options)).allocate(problem)
    assert problem.fits(found.assignment)
    return found.assignment


def _on_errors(unit: Unit) -> Unit:
    """Return a unit whose losses are its relative errors, by its share of weights."""
    choices = [replace(c, loss=c.error * unit.weights) for c in unit.choices]
    return replace(unit, choices=tuple(choices))


def _row(
    case: Case, label: str, name: str, bits: float, found: list[tuple[int, ...]]
) -> dict[str, Any]:
    kls = [case.test(assignment) for assignment in found]
    row: dict[str, Any] = {"target": label, "budget": bits, "allocator": name}
    row["policies"] = len(found) if name.startswith("policy") else None
    for text in TEXTS:
        each = [mean(kl[text]) for kl in kls]
        row[f"KL {text}"] = mean(each)
        row[f"± {text}"] = stdev(each) if len(each) > 1 else None
    row["bits"] = mean(case.bits(assignment) for assignment in found)
    return row


def main() -> None:
    """Train, apply, and write the result after each target."""
    parser = argparse.ArgumentParser(description=__doc__)
    allocators.add_case_arguments(parser)
    allocators.add_search_arguments(parser, budgets="3.0,3.5", seeds="0,1,2")
    parser.add_argument("--name", default="allocators_transfer", help="of the result")
    arguments = parser.parse_args()
    whole = allocators.settings_of(arguments)
    part = replace(whole, model=thinned(whole.model, whole.work / "thinned"))
    qwen = other_architecture(whole.model, whole.work / "qwen3-random")
    targets = {
        "all blocks": whole,
        "Qwen 3, random weights": replace(whole, model=qwen),
    }
    keys = [
        (bits, features, seed)
        for bits in arguments.budgets
        for features in FEATURES
        for seed in arguments.seeds
    ]
    spent = arguments.evaluations
    trained = {key: folder_of(part.work, part.model.name, key, spent) for key in keys}
    missing = [k for k, p in trained.items() if not (p / "policy.json").is_file()]
    if missing:
        train(
            part,
            missing,
            evaluations=spent,
            workers=arguments.workers,
            threads=arguments.threads,
        )
    figures: dict[str, Any] = whole.about() | {"evaluations of a training": spent}
    rows: list[dict[str, Any]] = []
    for label, settings in targets.items():
        rows += rows_of(Case(settings), label, trained, arguments.budgets)
        print(*rows, sep="\n", flush=True)
        figures["KL in nats"] = rows
        write_result(
            arguments.name,
            claim="Policies trained on 20 of the 30 blocks, applied without training "
            "to all of them and to another architecture with random weights, beside "
            "allocators that measure nothing, at the same bytes; mean and spread over "
            "policies of several seeds.",
            figures=figures,
            versions=(*PACKAGES, "stable-baselines3"),
        )


if __name__ == "__main__":
    main()
