"""Tables on what a served model does besides its weights: inputs and cache."""

from __future__ import annotations

from collections.abc import Mapping

from compress.report.tables import Report, Table
from compress.report.wording import (
    branch,
    count,
    divergence,
    duration,
    fixed,
    nats,
    number_at,
    percent,
    times,
)

_PARTS = {
    "weights_only": "weights",
    "compressed": "weights and inputs",
    "with_cache": "with the cache",
}
_PROMPT = {"compressed": "none", "with_prompt": "soft prompt"}
_FIGURES = ("perplexity", "ratio", "KL (nats)", "same top-1")


def parts_table(report: Report) -> Table:
    """Return KL and perplexity of the weights alone, and of all that is rounded.

    Empty where nothing but weights is rounded.
    """
    metrics = branch(report, "metrics")
    if not (metrics.get("weights_only") or metrics.get("with_cache")):
        return Table("Weights, inputs and cache", (), "", ())
    rows = []
    for text in branch(metrics, "compressed", "texts"):
        for part, words in _PARTS.items():
            figures = branch(metrics, part, "texts", text)
            if not figures:
                continue
            if part == "compressed" and not metrics.get("weights_only"):
                words = "weights"
            rows.append((text, words, *_figures(figures)))
    headers = ("text", "rounded", *_FIGURES)
    caption = (
        "Each row adds to the one above; all are against the base. The figures of the "
        "quality table are those of weights and inputs together."
    )
    return Table("Weights, inputs and cache", headers, "llrrrr", tuple(rows), caption)


def _figures(figures: Report) -> tuple[str, ...]:
    return (
        fixed(number_at(figures, "perplexity")),
        times(number_at(figures, "ppl_ratio"), 4),
        divergence(figures),
        percent(number_at(figures, "top1")),
    )


def prompt_table(report: Report) -> Table:
    """Return KL and perplexity with and without a soft prompt, for each text."""
    metrics, served = branch(report, "metrics"), branch(report, "recovery", "served")
    rows = [
        (text, words, *_figures(figures))
        for text in branch(metrics, "with_prompt", "texts")
        for part, words in _PROMPT.items()
        if (figures := branch(metrics, part, "texts", text))
    ]
    caption = (
        f"The prompt is {count(number_at(served, 'tokens'))} virtual tokens, "
        f"{count(number_at(served, 'bytes'))} bytes, before every window; the same "
        "tokens of text are counted with it and without."
    )
    title, headers = "With the soft prompt", ("text", "prompt", *_FIGURES)
    return Table(title, headers, "llrrrr", tuple(rows), caption if rows else "")


def upgrades_table(report: Report) -> Table:
    """Return what was tried on the inputs, and what it gave."""
    found = branch(report, "inputs")
    rows = [
        (
            str(step["inputs"]),
            nats(number_at(step, "kl")),
            percent(number_at(step, "rise"), 3),
            "yes" if step["kept"] else "no",
        )
        for step in found.get("steps") or []
    ]
    headers = ("inputs", "KL (nats)", "rise of perplexity", "kept")
    return Table("Inputs", headers, "lrrl", tuple(rows), _upgrades(found))


def _upgrades(found: Report) -> str:
    if not found:
        return ""
    seconds = branch(found, "seconds")
    spent = f"It took {duration(number_at(seconds, 'total'))}."
    tokens = count(number_at(found, "tokens"))
    where = f"On {tokens} tokens of calibration text, against the base."
    rated = found.get("inputs") or []
    if not rated:
        limit = percent(number_at(found, "limit"), 3)
        return f"{where} No upgrade is needed: the rise is within {limit}. {spent}"
    median, factor = number_at(found, "median_kl"), number_at(found, "factor")
    lines = [
        f"block {r['block']}, {r['input']}: {r['mode']} ({_kl(branch(r, 'kl'))})"
        for r in rated
        if r["mode"] != r["planned"]
    ]
    named = f"Upgraded: {'; '.join(lines)}." if lines else "None was upgraded."
    return (
        f"{where} Outliers are inputs whose own KL exceeds {factor:g} times the median "
        f"of {nats(median)}. {named} {spent}"
    )


def _kl(kl: Mapping[str, float]) -> str:
    return ", ".join(f"{mode} {nats(value)}" for mode, value in kl.items())


def cache_table(report: Report) -> Table:
    """Return what each type of the key-value cache costs, and which to take."""
    cache = branch(report, "kv_cache")
    rows = [
        (
            str(entry["keys"]),
            str(entry["values"]),
            fixed(number_at(entry, "bits")),
            count(number_at(entry, "bytes_per_token")),
            divergence(entry),
            percent(number_at(entry, "top1")),
            times(number_at(entry, "ppl_ratio"), 4),
        )
        for entry in cache.get("types") or []
    ]
    headers = (
        *("keys", "values", "bits", "bytes a token"),
        *("KL (nats)", "same top-1", "ratio"),
    )
    return Table("Key-value cache", headers, "llrrrrr", tuple(rows), _advice(cache))


def _advice(cache: Report) -> str:
    parts = []
    if cache.get("types"):
        parts.append(
            f"Against the same weights with exact inputs and cache: {cache['text']} "
            f"({cache['protocol']}, {count(number_at(cache, 'tokens'))} tokens)."
        )
    advice = {"recommended": "For llama.cpp", "recommended_tight": "If memory is short"}
    for key, words in advice.items():
        choice = branch(cache, key)
        if choice:
            parts.append(
                f"{words}: {choice['llamacpp_flags']} (KL within {choice['limit']:g})."
            )
    if cache.get("scheme") == "fp8":
        parts.append(
            f"FP8 scales are in the safetensors export: {cache['strategy']}, "
            f"{cache['scale']}, from {count(number_at(cache, 'samples'))} samples."
        )
    return " ".join(parts)
