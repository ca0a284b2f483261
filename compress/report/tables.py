"""What the report says, as tables of text; the three forms only draw them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from compress.report.wording import (
    MISSING,
    agreement,
    branch,
    calibration_note,
    count,
    divergence,
    duration,
    fixed,
    grade_of,
    nats,
    number_at,
    percent,
    significant,
    size,
    times,
    with_error,
)

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Attributes:
        title: Heading.
        headers: One for each column.
        align: ``l`` or ``r`` for each column.
        rows: Cells as text.
        caption: What a reader must know to judge the numbers.
    """

    title: str
    headers: tuple[str, ...]
    align: str
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


def _table(
    title: str,
    columns: Iterable[tuple[str, str]],
    rows: Iterable[Iterable[str]],
    *,
    caption: str = "",
) -> Table:
    """Return a table without the columns that nothing is known about."""
    cells = [tuple(row) for row in rows]
    kept = [
        (index, header, align)
        for index, (header, align) in enumerate(columns)
        if index == 0 or any(row[index] != MISSING for row in cells)
    ]
    return Table(
        title,
        tuple(header for _, header, _ in kept),
        "".join(align for _, _, align in kept),
        tuple(tuple(row[index] for index, _, _ in kept) for row in cells),
        caption,
    )


def size_table(report: Report) -> Table:
    """Return bytes and bits per weight, before and for each export."""
    sizes, bits = branch(report, "size_bytes"), branch(report, "bits_per_weight")
    base = number_at(sizes, "base")
    dtype = branch(report, "model").get("dtype")
    rows = []
    for name in sizes:
        bytes_ = number_at(sizes, name)
        share = bytes_ / base if base and bytes_ is not None else None
        label = f"base ({dtype})" if name == "base" and dtype else name
        per_weight = fixed(number_at(bits, name))
        rows.append((label, size(bytes_), count(bytes_), percent(share), per_weight))
    linears = number_at(bits, "linears")
    caption = (
        f"The quantized layers alone take {fixed(linears)} bits per weight, with "
        "scales and zero points; a file also holds embeddings, head and norms."
        if linears is not None
        else ""
    )
    columns = [
        ("model", "l"),
        ("size", "r"),
        ("bytes", "r"),
        ("of base", "r"),
        ("bits per weight", "r"),
    ]
    return _table("Size", columns, rows, caption=caption)


def _evaluated(report: Report) -> list[tuple[str, Report, Report]]:
    """Return each text with the base's numbers and the compressed model's."""
    base = branch(report, "metrics", "base", "texts")
    compressed = branch(report, "metrics", "compressed", "texts")
    names = [*base, *(name for name in compressed if name not in base)]
    return [(name, branch(base, name), branch(compressed, name)) for name in names]


def _perplexity(metrics: Report) -> str:
    return with_error(
        fixed(number_at(metrics, "perplexity")),
        fixed(number_at(metrics, "perplexity_se")),
    )


def quality_table(report: Report) -> Table:
    """Return perplexity, KL and top-1 agreement for each text, before and after."""
    rows = []
    for name, base, compressed in _evaluated(report):
        either = {**base, **compressed}
        grade = grade_of(number_at(compressed, "kl"))
        rows.append(
            (
                name,
                str(either.get("protocol") or MISSING),
                count(number_at(either, "tokens")),
                _perplexity(base),
                _perplexity(compressed),
                times(number_at(compressed, "ppl_ratio")),
                divergence(compressed),
                agreement(compressed),
                grade.label if grade else MISSING,
            )
        )
    columns = [
        ("text", "l"),
        ("protocol", "l"),
        ("tokens", "r"),
        ("perplexity base", "r"),
        ("compressed", "r"),
        ("ratio", "r"),
        ("KL (nats)", "r"),
        ("same top-1", "r"),
        ("light", "l"),
    ]
    caption = (
        "± is one standard error. Both models saw the same tokens; KL and top-1 "
        "compare the compressed model with the base, token by token. "
        + calibration_note(report)
    )
    return _table("Quality", columns, rows, caption=caption if rows else "")


def distance_table(report: Report) -> Table:
    """Return how the divergence is spread over tokens, for each text."""
    quantiles = {
        "kl_median": "median",
        "kl_p90": "90 %",
        "kl_p95": "95 %",
        "kl_p99": "99 %",
        "kl_p999": "99.9 %",
        "kl_max": "max",
    }
    rows = [
        (
            name,
            nats(number_at(compressed, "kl")),
            *(nats(number_at(compressed, key)) for key in quantiles),
            percent(number_at(compressed, "dp_rms"), 2),
            percent(number_at(compressed, "flips"), 2),
            fixed(number_at(base, "bits_per_byte"), 4),
            fixed(number_at(compressed, "bits_per_byte"), 4),
        )
        for name, base, compressed in _evaluated(report)
    ]
    columns = [("text", "l"), ("mean KL", "r")]
    columns += [(label, "r") for label in quantiles.values()]
    columns += [("RMS of Δp", "r"), ("flips", "r")]
    columns += [("bits per byte, base", "r"), ("compressed", "r")]
    caption = (
        "KL in nats, by percentile of tokens. Δp is the change of the true token's "
        "probability; flips are tokens that only one of the models predicts rightly."
    )
    return _table("Distance to the base model", columns, rows, caption=caption)


def export_table(report: Report) -> Table:
    """Return what reopening each export with its consumer has shown."""
    rows = []
    for name, export in branch(report, "exports").items():
        verify, codes = branch(export, "verify"), branch(export, "codes")
        rows.append(
            (
                name,
                size(number_at(export, "size_bytes")),
                str(verify.get("consumer") or MISSING),
                nats(number_at(verify, "kl")),
                _limit(number_at(verify, "limit")),
                nats(number_at(verify, "kl_as_served")),
                percent(number_at(verify, "top1"), 2),
                count(number_at(verify, "tokens")),
                verdict(verify),
                _codes_verdict(codes),
            )
        )
    columns = [
        ("export", "l"),
        ("size", "r"),
        ("reopened with", "l"),
        ("KL to memory", "r"),
        ("limit", "r"),
        ("KL as served", "r"),
        ("same top-1", "r"),
        ("tokens", "r"),
        ("result", "l"),
        ("codes read back", "l"),
    ]
    return _table("Exports and verification", columns, rows, caption=_shared(report))


def _limit(value: float | None) -> str:
    return MISSING if value is None else f"{value:g}"


def verdict(verify: Report) -> str:
    """Return one word on a verification: passed, FAILED, or why there is none."""
    if "passed" in verify:
        return "passed" if verify["passed"] else "FAILED"
    return f"skipped: {verify['skipped']}" if verify.get("skipped") else "not verified"


def _codes_verdict(codes: Report) -> str:
    if not codes:
        return MISSING
    layers = count(number_at(codes, "layers"))
    if codes.get("identical"):
        return f"identical in {layers} layers"
    return f"DIFFERENT ({layers} layers compared)"


def _shared(report: Report) -> str:
    shared = branch(report, "one_plan_two_files")
    if not shared:
        return ""
    layers = count(number_at(shared, "layers"))
    if shared.get("identical"):
        return f"One plan, two files: all {layers} layers decode to the same values."
    return f"One plan, two files: the files DIFFER ({layers} layers compared)."


def group_table(report: Report) -> Table:
    """Return the layers by role, method and scheme."""
    groups: dict[tuple[str, str, str], list[Report]] = {}
    for layer in report.get("layers") or []:
        keys = (str(layer.get(name)) for name in ("role", "method", "scheme"))
        role, method, scheme = keys
        groups.setdefault((role, method, scheme), []).append(layer)
    roles = list(dict.fromkeys(role for role, _, _ in groups))
    rows = []
    for key, layers in sorted(groups.items(), key=lambda g: roles.index(g[0][0])):
        errors = _numbers(layers, "error") or []
        weight_errors = _numbers(layers, "weight_error")
        rows.append(
            (
                *key,
                count(len(layers)),
                fixed(_mean(_numbers(layers, "bits_per_weight"))),
                size(sum(_numbers(layers, "bytes_before"))),
                size(sum(_numbers(layers, "bytes_after"))),
                significant(statistics.median(errors) if errors else None),
                significant(max(errors) if errors else None),
                significant(
                    statistics.median(weight_errors) if weight_errors else None
                ),
            )
        )
    columns = [("role", "l"), ("method", "l"), ("scheme", "l"), ("layers", "r")]
    columns += [("bits per weight", "r"), ("before", "r"), ("after", "r")]
    columns += [("median error", "r"), ("worst error", "r")]
    columns += [("median weight error", "r")]
    return _table("Layers by role", columns, rows, caption=ERROR_NOTE if rows else "")


ERROR_NOTE = (
    "Error is the relative squared error of a layer's output on the calibration text; "
    "weight error is that of the weights themselves, every weight counting the same."
)


def _numbers(layers: Iterable[Report], key: str) -> list[float]:
    found = (number_at(layer, key) for layer in layers)
    return [value for value in found if value is not None]


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def worst_layers_table(report: Report, limit: int = 10) -> Table:
    """Return the layers with the largest error, most first."""
    layers = list(report.get("layers") or [])
    key = "error" if _numbers(layers, "error") else "weight_error"
    ranked = sorted(layers, key=lambda layer: -(number_at(layer, key) or 0.0))
    rows = [
        (
            str(layer.get("name")),
            str(layer.get("method")),
            str(layer.get("scheme")),
            significant(number_at(layer, "error")),
            significant(number_at(layer, "weight_error")),
            "; ".join(map(str, layer.get("notes") or [])) or MISSING,
        )
        for layer in ranked[:limit]
    ]
    columns = [("layer", "l"), ("method", "l"), ("scheme", "l"), ("error", "r")]
    columns += [("weight error", "r"), ("notes", "l")]
    return _table(f"The {len(rows)} worst of {len(layers)} layers", columns, rows)


def run_table(report: Report) -> Table:
    """Return time and memory, as predicted and as measured."""
    predicted, seconds = branch(report, "predicted"), branch(report, "seconds")
    spent = [float(v) for v in seconds.values() if isinstance(v, (int, float))]
    rows = [
        (
            "peak memory",
            size(number_at(predicted, "peak_memory_bytes")),
            size(number_at(report, "peak_memory_bytes")),
        ),
        *_gpu_memory(report),
        (
            "total time",
            duration(number_at(predicted, "seconds")),
            duration(sum(spent) if spent else None),
        ),
    ]
    for name in seconds:
        rows.append((f"– {name}", MISSING, duration(number_at(seconds, name))))
    sizes = branch(report, "size_bytes")
    for name in branch(predicted, "size_bytes"):
        expected = number_at(branch(predicted, "size_bytes"), name)
        rows.append((f"size of {name}", size(expected), size(number_at(sizes, name))))
    columns = [("quantity", "l"), ("predicted", "r"), ("measured", "r")]
    return _table("Time and memory", columns, rows)


def _gpu_memory(report: Report) -> list[tuple[str, str, str]]:
    """Return a row for the GPU that took most, if there was one."""
    processes = report.get("processes")
    rows = processes if isinstance(processes, list) else []
    taken = [x["device_peak_bytes"] for x in rows if "device_peak_bytes" in x]
    if not taken:
        return []
    expected = number_at(branch(report, "predicted"), "device_memory_bytes")
    return [("peak GPU memory", size(expected), size(max(taken)))]


def provenance_table(report: Report) -> Table:
    """Return what decides the result: versions, seed, hashes, hardware."""
    model, hardware = branch(report, "model"), branch(report, "hardware")
    rows: list[tuple[str, str]] = [
        ("model", str(model.get("path") or model.get("label") or MISSING)),
        ("calibration", calibration_note(report)),
        ("seed", str(report.get("seed", MISSING))),
        ("date", str(report.get("date") or MISSING)),
    ]
    rows += [
        (f"{name} version", str(v)) for name, v in branch(report, "versions").items()
    ]
    rows += [
        (f"hash of {name}", str(v or MISSING))
        for name, v in branch(report, "hashes").items()
    ]
    for name, value in hardware.items():
        if name == "memory_bytes":
            rows.append(("memory", size(number_at(hardware, name))))
        else:
            rows.append((name, str(value)))
    return _table("Provenance", [("what", "l"), ("value", "l")], rows)
