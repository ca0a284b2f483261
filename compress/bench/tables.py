"""The outcome of a benchmark as tables of text, for terminals and pages alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compress.report.tables import Table
from compress.report.wording import (
    MISSING,
    branch,
    count,
    duration,
    fixed,
    number_at,
    percent,
    size,
    times,
)

Data = Mapping[str, Any]


def tables_of(data: Data) -> list[Table]:
    """Return the tables of a benchmark of kernels or of a model."""
    if data["kind"] == "kernels":
        return [ratio_table(data), kernel_table(data)]
    return [speed_table(data), efficiency_table(data)]


def kernel_table(data: Data) -> Table:
    """Return all times of kernels, one row a shape, number of tokens and way."""
    headers = ("N x K", "M", "way", "us", "+-", "GB/s", "TOPS", "of limit")
    rows = [_kernel_row(row) for row in data["rows"]]
    limits = branch(data, "limits")
    peaks = branch(limits, "operations_per_second")
    known = ", ".join(f"{k} {fixed(v / 1e12, 0)} TOPS" for k, v in peaks.items())
    bandwidth = fixed(limits["bytes_per_second"] / 1e12)
    return Table(
        "Linear layers",
        (*headers, "x bf16", "cold us"),
        "lrlrrrrrrr",
        tuple(rows),
        "Time of a call in a graph over rotating weights (chain), and of one cold "
        f"call. Measured limits: {bandwidth} TB/s, {known}. w6a8 rows were computed by "
        f"{data['engine']}.",
    )


def ratio_table(data: Data) -> Table:
    """Return how many times faster than bf16 each way is, over all shapes."""
    tokens = sorted({row["tokens"] for row in data["rows"]})
    names = list(dict.fromkeys(row["name"] for row in data["rows"]))
    rows = [
        (name, *(times(ratio_to_bf16(data["rows"], name, m), 2) for m in tokens))
        for name in names
        if name != "bf16"
    ]
    return Table(
        "Times faster than bf16",
        ("way", *(f"M={m}" for m in tokens)),
        "l" + "r" * len(tokens),
        tuple(rows),
        "Geometric mean over all shapes, chain timing.",
    )


def ratio_to_bf16(rows: Iterable[Data], name: str, tokens: int) -> float | None:
    """Return the geometric mean over shapes of a way's speed in terms of bf16's."""
    found = [
        row["times_bf16"]
        for row in rows
        if row["name"] == name and row["tokens"] == tokens and row.get("times_bf16")
    ]
    if not found:
        return None
    return math.exp(sum(map(math.log, found)) / len(found))


def speed_table(data: Data) -> Table:
    """Return speed and memory of each way of running a model."""
    headers = ("way", "batch", "tokens/s", "first token", "a token", "request")
    rows: list[tuple[str, ...]] = []
    for way in data["ways"]:
        for found in way["requests"]:
            name = f"{way['way']}: {way['label']}"
            if "error" in found:
                blank = (MISSING,) * 6
                rows.append((name, count(found["batch"]), *blank, found["error"]))
                continue
            peak = branch(found, "peak_gb")
            rows.append(
                (
                    name,
                    count(found["batch"]),
                    fixed(found["it_tok_s"], 1),
                    _milliseconds(found["ttft_s"]["median"]),
                    _milliseconds(found["itl_s"]["median"]),
                    duration(found["al_s"]),
                    size(found["kv_bytes"]),
                    fixed(number_at(peak, "allocated"), 2),
                    "CUDA graph" if found["cuda_graph"] else _eager(found),
                )
            )
    protocol = data["protocol"]
    prefills = [_prefill_text(way) for way in data["ways"]]
    return Table(
        "Generation",
        (*headers, "KV cache", "peak GB", "run as"),
        "lrrrrrrrl",
        tuple(rows),
        f"On {_devices(data)}. Prompts of {protocol['context_tokens']} tokens, "
        f"{protocol['new_tokens']} generated, medians of {protocol['runs']}. "
        + " ".join(prefills),
    )


def efficiency_table(data: Data) -> Table:
    """Return the six figures of EfficientLLM, and what explains them."""
    rows = []
    for way in data["ways"]:
        for found in way["requests"]:
            if "error" in found:
                continue
            rows.append(
                (
                    way["way"],
                    count(found["batch"]),
                    size(way["weights_bytes"]),
                    fixed(number_at(found, "amu_gb"), 2),
                    percent(number_at(found, "pcu")),
                    percent(number_at(found, "mfu")),
                    duration(found["al_s"]),
                    fixed(found["it_tok_s"], 1),
                    fixed(number_at(found, "power_w"), 1),
                    fixed(number_at(found, "j_per_token"), 3),
                )
            )
    sources = sorted({way["counters"] for way in data["ways"]})
    names = ("mcr", "mcr_size_factor", "mcr_performance_factor")
    mcr, of_size, rest = (fixed(number_at(data, name), 3) for name in names)
    factors = f"MCR {mcr}: size {of_size} times performance {rest}."
    missing = "MCR was not measured: give --original."
    return Table(
        "Efficiency",
        ("way", "batch", "weights", "AMU GB", "PCU", "MFU", "AL", "IT tok/s", "AEC W")
        + ("J/token",),
        "lrrrrrrrrr",
        tuple(rows),
        f"Counters: {', '.join(sources)}; a dash was not measured. "
        + (missing if data.get("mcr") is None else factors),
    )


def speed_points(data: Data) -> dict[str, list[tuple[float, float]]]:
    """Return batch and tokens a second of each way."""
    return {
        f"{way['way']}: {way['label']}": [
            (found["batch"], found["it_tok_s"])
            for found in way["requests"]
            if "error" not in found
        ]
        for way in data["ways"]
    }


def _kernel_row(row: Data) -> tuple[str, ...]:
    start = (f"{row['rows']} x {row['columns']}", str(row["tokens"]), row["name"])
    if "error" in row:
        return (*start, *(MISSING,) * 6, row["error"])
    return (
        *start,
        fixed(row["seconds"] * 1e6, 2),
        percent(row["spread"], 0),
        count(row["gb_per_second"]),
        fixed(row["tops"], 1),
        percent(row["of_limit"], 0),
        times(row["times_bf16"], 2),
        fixed(row["cold_seconds"] * 1e6, 1),
    )


def _prefill_text(way: Data) -> str:
    found = way["prefill"]
    if "error" in found:
        return f"Prefill, {way['way']}: {found['error']}."
    rate = fixed(found["tok_s"], 0)
    return f"Prefill of {found['tokens']} tokens, {way['way']}: {rate} tokens/s."


def _devices(data: Data) -> str:
    return ", ".join(sorted({str(way["device"]) for way in data["ways"]}))


def _eager(found: Data) -> str:
    how = str(found.get("run_as") or "eager")
    return f"{how} ({found['no_graph']})" if found.get("no_graph") else how


def _milliseconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def series_of(rows: Sequence[Data], shape: tuple[int, int]) -> dict[str, list[Any]]:
    """Return tokens and microseconds of the whole layers of a shape, by way."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        if (row["rows"], row["columns"]) != shape or "seconds" not in row:
            continue
        if not row["name"].endswith("alone"):
            point = (row["tokens"], row["seconds"] * 1e6)
            found.setdefault(row["name"], []).append(point)
    return found
