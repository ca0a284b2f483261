"""The points of a sweep: every model, sparsity, size and combination, as configs."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compress.config.budget_sections import budget_assignments
from compress.config.loader import load_config
from compress.config.schema import Config
from compress.config.sweep_sections import SweepConfig
from compress.core.errors import ConfigError

_WORD = 24  # letters of a value in a point's name


@dataclass(frozen=True)
class SweepPoint:
    """One run of a sweep.

    Attributes:
        name: Of its folder, and in tables.
        size: The budget or the scheme, as it was given.
        settings: What else is varied, by key of the config.
        config: Whole, with a work directory of its own.
    """

    name: str
    size: str
    settings: Mapping[str, Any]
    config: Config


def sweep_points(loaded: SweepConfig) -> list[SweepPoint]:
    """Return every size under every combination, checked; none of them twice.

    Raises:
        ConfigError: A combination is no valid config, or could not be measured.
    """
    base = loaded.base if isinstance(loaded.base, str) else dict(loaded.base)
    found: dict[str, SweepPoint] = {}
    seen: set[str] = set()
    for settings in _combinations(loaded):
        for size, chosen in _sizes(loaded):
            config = load_config(base, [*_assignments(settings), *chosen])
            _check(config, size, loaded)
            same = config.model_dump_json(exclude={"run": {"workdir"}})
            if same in seen:  # an allocator's options do not matter to a scheme
                continue
            seen.add(same)
            shown = {k: v for k, v in settings.items() if k in _varied(loaded)}
            words = [size, *map(_word, shown.values())]
            name = "-".join(re.sub(r"[^\w.]+", "_", word) for word in words)
            if name in found:
                name = f"{name}-{len(found)}"
            folder = loaded.workdir / "points" / name / "run"
            run = config.run.model_copy(update={"workdir": folder})
            config = config.model_copy(update={"run": run})
            found[name] = SweepPoint(name, size, shown, config)
    return list(found.values())


def _combinations(loaded: SweepConfig) -> Iterator[dict[str, Any]]:
    values = _values(loaded)
    for chosen in itertools.product(*values.values()):
        yield dict(zip(values, chosen, strict=True))


def _values(loaded: SweepConfig) -> dict[str, tuple[Any, ...]]:
    """Return what each key of the base takes."""
    own = {"model.path": loaded.models, "prune.sparsity": loaded.sparsities}
    return {**{key: v for key, v in own.items() if v}, **loaded.set}


def _varied(loaded: SweepConfig) -> set[str]:
    return {key for key, values in _values(loaded).items() if len(values) > 1}


def _sizes(loaded: SweepConfig) -> Iterator[tuple[str, list[str]]]:
    """Yield each size as it was given, and what it sets."""
    for budget in loaded.budgets:
        yield budget, budget_assignments(budget)
    for scheme in loaded.schemes:
        word = json.dumps(scheme)
        yield scheme, ["budget=null", "allocate=null", f"quantize.scheme={word}"]


def _assignments(settings: Mapping[str, Any]) -> list[str]:
    found = []
    for key, value in settings.items():
        if key == "prune.sparsity" and not value:
            found += ["prune=null", "recover=null"]
        else:
            found.append(f"{key}={json.dumps(value)}")
    return found


def _check(config: Config, size: str, loaded: SweepConfig) -> None:
    formats = [entry.format for entry in config.export]
    if config.budget is None and (config.evaluate is None or not formats):
        raise ConfigError(
            f"schemes: {size}: without a search nothing measures the point; give the "
            "base evaluate.perplexity, and the export whose bytes count"
        )
    if config.budget is None and config.evaluate and not config.evaluate.kl:
        raise ConfigError("base.evaluate.kl: a sweep needs it; leave it true")
    if loaded.speed and "gguf" not in formats:
        raise ConfigError(
            "speed: llama.cpp runs GGUF files; add {format: gguf} to the base's export"
        )


def _word(value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text.strip('{}[]"/ ').rpartition("/")[2][:_WORD] or "none"
