"""Sweeps: one config under many budgets, and the front of bytes against KL.

Each point is the base config with one budget and one combination of the varied keys, in
a work directory of its own. All draw on one level database, the cache: a layer is
quantized to a scheme once, whatever the budgets. A point that is finished is not run
again, and one that was interrupted goes on where it stopped.

How far a point goes is what the base asks for. With ``evaluate`` it is quantized and
measured on the evaluation's first text; without, and without exports, there is nothing
to quantize for, and its KL is what the search measured of its plan.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from compress import pipeline, provenance
from compress.config import (
    Config,
    SweepConfig,
    budget_assignments,
    load_config,
    load_sweep,
)
from compress.core.errors import ConfigError
from compress.core.foreign import MALFORMED, parse_json
from compress.report.sweep import render_svg, render_sweep, sweep_text
from compress.workdir import WorkDir, write_atomically

_log = logging.getLogger(__name__)
_WORD = 24  # letters of a value in a point's name
_FIGURES = ("perplexity", "ppl_ratio", "kl", "kl_se", "top1")


@dataclass(frozen=True)
class Sweep:
    """A finished sweep.

    Attributes:
        data: What ``sweep.json`` holds.
        workdir: Where everything lies.
    """

    data: Mapping[str, Any]
    workdir: Path

    @property
    def failures(self) -> list[str]:
        """What reading exports back has disproved; empty if all is well."""
        return [text for point in self.data["points"] for text in point["failures"]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return dict(self.data)

    def text(self) -> str:
        """Return the table that ends a sweep."""
        files = [f"  {self.workdir / name}" for name in _FILES]
        return "\n".join([sweep_text(self.data), "", "Files", *files])


_FILES = ("sweep.html", "pareto.svg", "sweep.json")


@dataclass(frozen=True)
class _Point:
    name: str
    budget: str
    settings: Mapping[str, Any]
    config: Config


def sweep(
    config: SweepConfig | Mapping[str, Any] | str | Path,
    *,
    overwrite: bool = False,
    command: str | None = None,
) -> Sweep:
    """Run all points of a sweep that are not finished; write its tables and figures.

    Args:
        config: A YAML file, or the same as plain data.
        overwrite: Run finished points again.
        command: How the sweep was started, for the record.

    Raises:
        CompressError: One of its children, with what to do.
    """
    loaded = config if isinstance(config, SweepConfig) else load_sweep(config)
    foreign = _foreign_points(loaded.points) if loaded.points else []
    points = _points(loaded)
    work = WorkDir(loaded.workdir)
    done = {} if overwrite else {p.name: _finished(p, loaded) for p in points}
    waiting = [point for point in points if not done.get(point.name)]
    _check(waiting)
    found = []
    for number, point in enumerate(points, 1):
        _log.info("point %d of %d: %s", number, len(points), point.name)
        result = done.get(point.name) or _run(point, loaded, overwrite=overwrite)
        work.write_json(f"points/{point.name}/point.json", result)
        found.append(result["point"])
    data = {
        "version": 1,
        "config": loaded.model_dump(mode="json"),
        "command": command or "compress.sweep(config)",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": provenance.versions(),
        "points": _with_front(found),
        "foreign": foreign,
    }
    work.write_json("sweep.json", data)
    write_atomically(work.root / "pareto.svg", render_svg(data).encode())
    write_atomically(work.root / "sweep.html", render_sweep(data).encode())
    return Sweep(data, work.root)


def _points(loaded: SweepConfig) -> list[_Point]:
    """Return every budget under every combination of settings, checked."""
    varied = [key for key, values in loaded.set.items() if len(values) > 1]
    base = loaded.base if isinstance(loaded.base, str) else dict(loaded.base)
    found: dict[str, _Point] = {}
    for values in itertools.product(*loaded.set.values()):
        settings = dict(zip(loaded.set, values, strict=True))
        sets = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        for budget in loaded.budgets:
            words = [budget, *(_word(settings[key]) for key in varied)]
            name = "-".join(re.sub(r"[^\w.]+", "_", word) for word in words)
            if name in found:
                name = f"{name}-{len(found)}"
            folder = loaded.workdir / "points" / name / "run"
            config = load_config(base, [*sets, *budget_assignments(budget)])
            run = config.run.model_copy(update={"workdir": folder})
            config = config.model_copy(update={"run": run})
            shown = {key: settings[key] for key in varied}
            found[name] = _Point(name, budget, shown, config)
    return list(found.values())


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.strip('{}[]"/ ').rpartition("/")[2][:_WORD] or "none"


def _digest(point: _Point, loaded: SweepConfig) -> str:
    config = point.config.model_dump(mode="json")
    version = provenance.versions()["compress"]
    return provenance.digest_of([config, loaded.export, version])


def _finished(point: _Point, loaded: SweepConfig) -> dict[str, Any] | None:
    path = loaded.workdir / "points" / point.name / "point.json"
    if not path.is_file():
        return None
    try:
        stored: dict[str, Any] = parse_json(path.read_text("utf-8"))
        return stored if stored["with"] == _digest(point, loaded) else None
    except (OSError, *MALFORMED) as error:
        _log.warning("%s is damaged and made again: %s", path, error)
        return None


def _check(points: Sequence[_Point]) -> None:
    """Raise all that can be known before work: no export, or a budget too small."""
    problems = []
    for point in points:
        try:
            pipeline.plan(point.config)
        except ConfigError as error:
            problems.append(f"{point.name}: {error}")
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def _run(point: _Point, loaded: SweepConfig, *, overwrite: bool) -> dict[str, Any]:
    config, folder = point.config, point.config.run.workdir
    found: dict[str, Any] = {
        "name": point.name,
        "model": config.model.path,
        "budget": point.budget,
        "settings": dict(point.settings),
    }
    if config.evaluate is None and not loaded.export:
        outcome = pipeline.search(config)
        WorkDir(folder).write_json("search.json", outcome.to_dict())
        record, failures = outcome.record, []
        text, figures = "text of the search", {"kl": record["measured_kl"]}
        size = record["file_bytes"]
    else:
        result = pipeline.run(
            config, resume=True, overwrite=overwrite, write_exports=loaded.export
        )
        record, failures = result.report["allocation"], result.failures
        entry = result.report["exports"].get(record["format"], {})
        size = entry.get("size_bytes", record["file_bytes"])
        text, figures = _measured(result.report, record)
    found |= {
        "budget_bytes": record["budget_bytes"],
        "bytes": size,
        "text": text,
        **figures,
        "predicted_kl": record["predicted_kl"],
        "search_kl": record["measured_kl"],
        "evaluations": record["evaluations"],
        "seconds": sum(record["seconds"].values()),
        "failures": failures,
        "workdir": str(folder),
    }
    return {"with": _digest(point, loaded), "point": found}


def _measured(
    report: Mapping[str, Any], record: Mapping[str, Any]
) -> tuple[str, dict[str, float]]:
    """Return the first text that was evaluated, and the figures on it."""
    texts = (report["metrics"]["compressed"] or {}).get("texts", {})
    for name, figures in texts.items():
        if "kl" in figures:
            return name, {key: figures[key] for key in _FIGURES if key in figures}
    return "text of the search", {"kl": record["measured_kl"]}


def _with_front(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the points, each marked whether none of its model is smaller and closer.

    Fewest bytes first. Of equal points the first is on the front.
    """
    found = []
    best: dict[str, float] = {}
    for point in sorted(points, key=lambda p: (p["bytes"], p["kl"])):
        is_better = point["kl"] < best.get(point["model"], float("inf"))
        if is_better:
            best[point["model"]] = point["kl"]
        found.append({**point, "on_front": is_better})
    return found


def _foreign_points(path: str) -> list[dict[str, Any]]:
    """Read points of other tools.

    Raises:
        ConfigError: It is no list of objects with name, bytes and kl.
    """
    try:
        data = parse_json(Path(path).read_text("utf-8"))
        return [
            {
                "name": str(point["name"]),
                "bytes": int(point["bytes"]),
                "kl": float(point["kl"]),
            }
            for point in data
        ]
    except OSError as error:
        raise ConfigError(f"points: {path} cannot be read: {error.strerror}") from error
    except MALFORMED as error:
        raise ConfigError(
            f"points: {path} is no JSON list of objects with name, bytes and kl: "
            f"{type(error).__name__}: {error}"
        ) from error
