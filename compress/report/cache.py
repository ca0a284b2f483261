"""A study of cache types as tables: totals, the worst blocks, and which to take."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from compress.report.markdown import table_sections
from compress.report.tables import Table
from compress.report.terminal import ASCII, draw_table
from compress.report.wording import (
    branch,
    count,
    divergence,
    fixed,
    nats,
    number_at,
    percent,
    size,
    times,
)

Data = Mapping[str, Any]
_RUNTIMES = {"llama.cpp": "llama.cpp", "vllm": "vLLM", "any": "any", "none": "study"}
_SHOWN_BLOCKS = 3
_WIDTH = 110


def study_text(data: Data) -> str:
    """Return tables and advice for a terminal."""
    tables = [t for t in (types_table(data), blocks_table(data)) if t.rows]
    parts = [f"{draw_table(t)}\n{textwrap.fill(t.caption, _WIDTH)}" for t in tables]
    said = [
        textwrap.fill(sentence, _WIDTH).translate(ASCII) for sentence in advice(data)
    ]
    return "\n\n".join([*parts, *said])


def study_markdown(data: Data) -> str:
    """Return the same in Markdown, with what was run."""
    sections = table_sections([types_table(data), blocks_table(data)])
    versions = ", ".join(f"{k} {v}" for k, v in branch(data, "versions").items())
    about = f"`{data['command']}`; {versions}"
    title = f"# Key-value cache of {data['model']}"
    return "\n\n".join([title, *sections, *advice(data), about]) + "\n"


def types_table(data: Data) -> Table:
    """Return a row for each pair of types: bits, bytes and distance."""
    contexts = [str(length) for length in data["contexts"]]
    rows = [
        (
            str(entry["keys"]),
            str(entry["values"]),
            _RUNTIMES[str(entry["runtime"])],
            fixed(number_at(entry, "bits")),
            f"{entry['bytes_per_token_f16'] / entry['bytes_per_token']:.2f}x",
            count(number_at(entry, "bytes_per_token")),
            *(size(number_at(branch(entry, "cache_bytes"), c)) for c in contexts),
            divergence(entry),
            nats(number_at(entry, "kl_p99")),
            percent(number_at(entry, "top1")),
            times(number_at(entry, "ppl_ratio"), 4),
        )
        for entry in [_exact(data), *data["types"]]
    ]
    headers = (
        *("keys", "values", "for", "bits", "smaller", "bytes a token"),
        *(f"at {int(length):,}" for length in contexts),
        *("KL (nats)", "99 %", "same top-1", "perplexity"),
    )
    weights = size(number_at(data, "weights_bytes"))
    return Table(
        "Key-value cache",
        headers,
        "lll" + "r" * (len(headers) - 3),
        tuple(rows),
        f"Against the same weights with an exact cache: {data['text']} "
        f"({data['protocol']}, {count(number_at(data, 'tokens'))} tokens). Bits "
        f"include scales; the model's files have {weights}. Types for study have no "
        "flag.",
    )


def _exact(data: Data) -> dict[str, Any]:
    per_token = data["types"][0]["bytes_per_token_f16"]
    sizes = {str(length): per_token * length for length in data["contexts"]}
    about = {"keys": "f16", "values": "f16", "runtime": "any", "bits": 16.0}
    return {
        **about,
        "bytes_per_token": per_token,
        "bytes_per_token_f16": per_token,
        "cache_bytes": sizes,
    }


def blocks_table(data: Data) -> Table:
    """Return the blocks in which the types that are recommended err most."""
    names = dict.fromkeys(
        f"{branch(data, key).get('keys')}/{branch(data, key).get('values')}"
        for key in ("recommended", "recommended_tight")
    )
    rows = []
    for entry in data["types"]:
        if entry["type"] not in names:
            continue
        for what in ("keys", "values"):
            errors = [block[what] for block in entry["blocks"]]
            known = [i for i in range(len(errors)) if errors[i] is not None]
            worst = sorted(known, key=lambda i: -errors[i])[:_SHOWN_BLOCKS]
            middle = sorted(errors[i] for i in known)[len(known) // 2] if known else 0
            shown = ", ".join(f"{i}: {percent(errors[i], 2)}" for i in worst)
            rows.append((str(entry["type"]), what, percent(middle, 2), shown))
    return Table(
        "Errors by block",
        ("type", "of", "median block", "worst blocks"),
        "llrl",
        tuple(rows),
        "Root mean square error over root mean square of what is stored.",
    )


def _beside_weights(data: Data) -> str:
    """Return how large an exact cache is beside the weights."""
    exact, weights = _exact(data)["cache_bytes"], data["weights_bytes"]
    shares = ", ".join(
        f"{percent(exact[str(length)] / weights)} at {int(length):,} tokens"
        for length in data["contexts"]
    )
    return f"An exact cache of one sequence, beside the weights: {shares}."


def advice(data: Data) -> list[str]:
    """Return what to take in llama.cpp and in vLLM, in sentences."""
    lines = [_beside_weights(data)]
    words = {"recommended": "llama.cpp", "recommended_tight": "llama.cpp, memory short"}
    for key, where in words.items():
        choice = branch(data, key)
        cost = f"KL {nats(number_at(choice, 'kl'))}, limit {choice['limit']:g}"
        lines.append(f"{where}: {choice['llamacpp_flags']} ({cost}).")
    vllm = branch(data, "recommended_vllm")
    if vllm:
        cost = f"KL {nats(number_at(vllm, 'kl'))}, limit {vllm['limit']:g}"
        lines.append(f"vLLM: {vllm['vllm_flags']} ({cost}). {vllm['how']}")
    return lines
