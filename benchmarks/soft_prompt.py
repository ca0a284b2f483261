"""What a soft prompt gives back, and whether it can go with another size of the model.

    python benchmarks/soft_prompt.py MODEL

Three compressed forms of a model are made by ``compress.run``, each with a prompt
learned for it. Then each runs over three kinds of text without a prompt, with its own,
and with those that were learned for the others; the original runs with one as well,
which says whether it recovers or adapts to a domain. All texts are read in windows
of which the prompt is no part; none is trained on.

A run that was stopped goes on; ``--only int3`` makes one form and stops there.
"""

from __future__ import annotations

import argparse
import resource
from pathlib import Path
from typing import Any

import torch
from results import write_result

import compress
from compress.evaluation.measure import evaluate_candidates, prepare_texts
from compress.log import set_up_logging
from compress.model.loading import open_model
from compress.recovery.soft_prompt import read_prompt
from compress.scoring import streamed
from compress.served_folder import Served

TEXTS = ("wikitext2", "tales", "code")
FORMS: dict[str, dict[str, Any]] = {
    "int3": {"quantize": {"method": "rtn", "scheme": "int3-g64"}},
    "int4": {"quantize": {"method": "rtn", "scheme": "int4-g64"}},
    "pruned": {"prune": {"method": "cfsp", "sparsity": 0.2, "repair": "none"}},
}
ABOUT = {
    "original": "original",
    "int3": "int3-g64, rtn",
    "int4": "int4-g64, rtn",
    "pruned": "20 % of the neurons pruned",
}


def main() -> None:
    """Make the forms that are missing; with all of them, write the figures."""
    arguments = parsed()
    set_up_logging()
    torch.set_num_threads(arguments.threads)
    made = {
        name: made_form(arguments, name)
        for name in FORMS
        if arguments.only in (None, name)
    }
    if arguments.only is not None:
        return
    rows = measured(arguments, {n: r.workdir for n, r in made.items()})
    training = []
    for name, result in made.items():
        record = result.report["recovery"]
        training.append(
            {
                "prompt of": ABOUT[name],
                "virtual tokens": record["served"]["tokens"],
                "bytes": record["served"]["bytes"],
                "steps": record["steps"],
                "best step": record["best_step"],
                "tokens of text": record["tokens"],
                "seconds": round(record["seconds"]),
                "held-out KL, no prompt": round(record["kl_without"], 4),
                "untrained": round(record["kl_before"], 4),
                "trained": round(record["kl_after"], 4),
            }
        )
    write_result(
        "soft_prompt",
        claim="How much does a soft prompt of a short training on a CPU give back, and "
        "does it help another size of the same model? Figures are perplexity and KL to "
        "the original on text that was not trained on; the paper trains 30 000 steps "
        "on a GPU.",
        figures={"on test text": rows, "training": training},
    )


def parsed() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", choices=FORMS)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=3e-2)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/benchmarks/soft_prompt")
    )
    return parser.parse_args()


def made_form(arguments: argparse.Namespace, name: str) -> compress.Result:
    """Return the run of one form, which goes on where it was stopped."""
    options = {
        "tokens": arguments.tokens,
        "steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
        "batch": 4,
        "sequence_length": 64,
        "samples": 128,
        "held_out": 8,
        "evaluations": 4,
        "checkpoint_minutes": 0,
    }
    config = {
        "model": {"path": str(arguments.model)},
        "calibration": {"samples": 16, "sequence_length": 128},
        **FORMS[name],
        "recover": {"method": "soft_prompt", "options": options},
        "export": [{"format": "safetensors"}],
        "run": {
            "workdir": str(arguments.work / name),
            "verify": False,
            "threads": arguments.threads,
        },
    }
    return compress.run(config, resume=True)


def measured(
    arguments: argparse.Namespace, folders: dict[str, Path]
) -> list[dict[str, Any]]:
    """Return a row for each form and prompt: perplexity and KL on each text."""
    cache = arguments.work / "cache"
    original = open_model(str(arguments.model), cache=cache)
    texts = prepare_texts(
        TEXTS,
        original.tokenizer(),
        protocol="windows",
        count=arguments.windows,
        length=arguments.length,
    )
    prompts = {name: read_prompt(folder / "prompt") for name, folder in folders.items()}
    pairs: dict[str, tuple[str, str]] = {}
    candidates = {}
    for name, folder in folders.items():
        handle = open_model(str(folder / "export" / "safetensors"), cache=cache)
        candidates[name] = streamed(handle).logits
        pairs[name] = (name, "none")
        for learned, prompt in prompts.items():
            key = f"{name}+{learned}"
            candidates[key] = streamed(handle, Served(prompt=prompt)).logits
            pairs[key] = (name, "own" if learned == name else f"of {learned}")
    prompted = streamed(original, Served(prompt=prompts["int3"]))
    candidates["original+int3"] = prompted.logits
    pairs["original+int3"] = ("original", "of int3")
    base, others = evaluate_candidates(
        texts,
        streamed(original).logits,
        candidates,
        hidden_size=int(original.description.config["hidden_size"]),
    )
    found = {"original": base, **others}
    pairs = {"original": ("original", "none"), **pairs}
    rows = []
    for key, (name, prompt_name) in pairs.items():
        row: dict[str, Any] = {"model": ABOUT[name], "prompt": prompt_name}
        for text in TEXTS:
            row[f"{text} perplexity"] = round(found[key][text]["perplexity"], 2)
            row[f"{text} KL"] = round(found[key][text].get("kl", 0.0), 4)
        rows.append(row)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(f"CPU time: {used.ru_utime + used.ru_stime:.0f} s")
    return rows


if __name__ == "__main__":
    main()
