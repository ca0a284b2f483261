"""How numbers and verdicts are said, in one place for all three forms of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MISSING = "–"
RERUN_NOTE = (
    "To run it again: save the config under the name that the command uses, then give "
    "the command. The same hashes mean the same inputs."
)


def plain_data(value: Any) -> Any:
    """Return ``value`` as JSON data: string keys, lists, and null for NaN or inf."""
    if isinstance(value, Mapping):
        return {str(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def branch(data: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """Return the mapping under ``keys``, empty where a part is missing or null."""
    for key in keys:
        found = data.get(key)
        if not isinstance(found, Mapping):
            return {}
        data = found
    return data


def number_at(data: Mapping[str, Any], key: str) -> float | None:
    """Return the finite number under ``key``, else ``None``."""
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def fixed(value: float | None, digits: int = 2) -> str:
    """Return a number with ``digits`` decimals, grouped by thousands."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def count(value: float | None) -> str:
    """Return a whole number, grouped by thousands."""
    return fixed(value, 0)


def significant(value: float | None) -> str:
    """Return three significant digits, as for relative errors over many decades."""
    if value is None:
        return MISSING
    return f"{value:#.3g}".rstrip(".") if value else "0"


def nats(value: float | None) -> str:
    """Return a divergence: four decimals, or an exponent where those would be zeros."""
    if value is None:
        return MISSING
    return f"{value:.4f}" if value == 0 or value >= 0.001 else f"{value:.1e}"


def percent(fraction: float | None, digits: int = 1) -> str:
    """Return a fraction of one as a percentage."""
    return MISSING if fraction is None else f"{100 * fraction:.{digits}f} %"


def times(ratio: float | None, digits: int = 3) -> str:
    """Return a factor."""
    return MISSING if ratio is None else f"×{ratio:.{digits}f}"


def with_error(value: str, error: str) -> str:
    """Return ``value`` with its standard error, when there is one."""
    return value if MISSING in (value, error) else f"{value} ± {error}"


def divergence(metrics: Mapping[str, Any]) -> str:
    """Return a mean KL with its standard error, both to the same decimals."""
    kl, error = number_at(metrics, "kl"), number_at(metrics, "kl_se")
    is_plain = kl is not None and kl >= 0.001 and error is not None and error >= 5e-5
    return with_error(nats(kl), fixed(error, 4) if is_plain else nats(error))


def agreement(metrics: Mapping[str, Any]) -> str:
    """Return the share of tokens with the same top-1, with its standard error."""
    top1, error = number_at(metrics, "top1"), number_at(metrics, "top1_se")
    if top1 is None or error is None:
        return percent(top1)
    return f"{100 * top1:.1f} ± {100 * error:.1f} %"


def size(bytes_: float | None) -> str:
    """Return a number of bytes in the binary unit that suits it."""
    if bytes_ is None:
        return MISSING
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(bytes_) >= factor:
            return f"{bytes_ / factor:,.{2 if unit == 'GiB' else 1}f} {unit}"
    return f"{bytes_:.0f} B"


def duration(seconds: float | None) -> str:
    """Return a time span in the units a person would use."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


@dataclass(frozen=True)
class Grade:
    """A lamp of the traffic light: told apart by word and shape, not colour alone."""

    name: str
    symbol: str
    meaning: str

    @property
    def label(self) -> str:
        """Symbol and word."""
        return f"{self.symbol} {self.name}"


GREEN = Grade("green", "●", "mean KL below 0.01 nats")
AMBER = Grade("amber", "▲", "mean KL from 0.01 to 0.05 nats")
RED = Grade("red", "■", "mean KL of 0.05 nats or more")
GRADES = (GREEN, AMBER, RED)
GRADE_LIMITS = (0.01, 0.05)


def grade_of(kl: float | None) -> Grade | None:
    """Return the lamp for a mean KL in nats, or ``None`` when it was not measured."""
    if kl is None:
        return None
    return GREEN if kl < GRADE_LIMITS[0] else AMBER if kl < GRADE_LIMITS[1] else RED


def sentence_list(items: Sequence[str]) -> str:
    """Return ``a, b and c``."""
    head, last = list(items[:-1]), items[-1]
    return f"{', '.join(head)} and {last}" if head else last


def worst_text(report: Mapping[str, Any]) -> str | None:
    """Name the text where the compressed model is worst: by KL, else by perplexity."""
    texts = branch(report, "metrics", "compressed", "texts")
    for key in ("kl", "ppl_ratio"):
        known = {name: number_at(branch(texts, name), key) for name in texts}
        found = {name: value for name, value in known.items() if value is not None}
        if found:
            return max(found, key=lambda name: found[name])
    return None


def text_name(name: str) -> str:
    """Return what a text is called where there is little room: a file without folders.

    Names of bundled texts, such as ``mix/prose``, stay whole.
    """
    is_path = name.startswith(("/", "~", "./", "../")) or name.endswith(".txt")
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2] if is_path else name


def methods_used(report: Mapping[str, Any]) -> str:
    """Return what was done to how many layers, most layers first."""
    tally: dict[str, int] = {}
    for layer in report.get("layers") or []:
        name = f"{layer.get('method')} {layer.get('scheme')}"
        tally[name] = tally.get(name, 0) + 1
    ordered = sorted(tally.items(), key=lambda item: -item[1])
    parts = [f"{name} ({total} layers)" for name, total in ordered[:4]]
    if len(ordered) > 4:
        parts.append(f"{len(ordered) - 4} more kinds")
    pruned = branch(report, "pruning")
    if pruned:
        parts.insert(0, f"pruned by {pruned.get('method')}")
    return sentence_list(parts) if parts else "no layer was quantized"


def calibration_note(report: Mapping[str, Any]) -> str:
    """Return one sentence on the calibration text, for print beside every figure."""
    calibration = branch(report, "calibration")
    if not calibration:
        return "No calibration text was used."
    data = calibration.get("data")
    if isinstance(data, list):
        names = [
            str(item.get("source", item)) if isinstance(item, Mapping) else str(item)
            for item in data
        ]
        data = sentence_list(names) if names else MISSING
    samples, length, tokens = (
        count(number_at(calibration, key))
        for key in ("samples", "sequence_length", "tokens")
    )
    arithmetic = calibration.get("dtype", "float32")
    used = (
        f"Calibrated on {data}: {samples} samples of {length}, {tokens} tokens, in "
        f"{arithmetic}."
    )
    return f"{used}{_experts_note(report)}"


def _experts_note(report: Mapping[str, Any]) -> str:
    experts = branch(report, "experts")
    if number_at(experts, "fewest_tokens") is None:
        return ""
    fewest, most, rounded, coded = (
        count(number_at(experts, key))
        for key in ("fewest_tokens", "most_tokens", "rounded_layers", "coded_layers")
    )
    return (
        f" An expert got {fewest} to {most} tokens; {rounded} of {coded} layers of "
        "experts had too few and were rounded to nearest."
    )
