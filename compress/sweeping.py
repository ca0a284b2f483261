"""Sweeps: one config over models, sparsities, budgets and schemes, and the front.

Each point is the base config with one size and one combination of the varied keys, in a
work directory of its own. All draw on one level database, the cache: a layer is
quantized to a scheme once, whatever the budgets; and points that prune alike share the
pruned model. A point that is finished is not run again, and one that was interrupted
goes on where it stopped.

How far a point goes is what the base asks for. With ``evaluate`` it is quantized and
measured on the evaluation's first text; without, and without exports, there is nothing
to quantize for, and its KL is what the search measured of its plan.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from compress import pipeline, provenance, reshaping, searching
from compress.config import SweepConfig, load_sweep
from compress.config.sweep_points import SweepPoint, sweep_points
from compress.core.errors import ConfigError
from compress.core.foreign import MALFORMED, parse_json
from compress.distributed.team import check_single
from compress.report.front import with_front
from compress.report.sweep import render_sweep, sweep_text
from compress.report.sweep_plots import render_svg
from compress.report.sweep_png import can_draw, render_png
from compress.report.wording import duration
from compress.sweep_speed import check_speed, speed_of
from compress.workdir import WorkDir, write_atomically

_log = logging.getLogger(__name__)
_FIGURES = ("perplexity", "ppl_ratio", "bits_per_byte", "kl", "kl_se", "top1")
SEARCH_TEXT = "text of the search"


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
        paths = [self.workdir / name for name in _FILES]
        files = [f"  {path}" for path in paths if path.is_file()]
        return "\n".join([sweep_text(self.data), "", "Files", *files])


_FILES = ("sweep.html", "pareto.svg", "pareto.png", "sweep.json")


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
    check_single("a sweep")
    loaded = config if isinstance(config, SweepConfig) else load_sweep(config)
    check_speed(loaded)
    foreign = _foreign_points(loaded.points) if loaded.points else []
    points = sweep_points(loaded)
    work = WorkDir(loaded.workdir)
    done = {} if overwrite else {p.name: _finished(p, loaded) for p in points}
    waiting = [point for point in points if not done.get(point.name)]
    _check(waiting)
    found: list[dict[str, Any]] = []
    started, made = time.monotonic(), 0
    for number, point in enumerate(points, 1):
        result = done.get(point.name)
        if result is None:
            left = _time_left(time.monotonic() - started, made, len(waiting))
            _log.info("point %d of %d: %s%s", number, len(points), point.name, left)
            if overwrite:
                WorkDir(point.config.run.workdir).clear()
            reshaping.share(point.config, [p.config for p in points[: number - 1]])
            result = _run(point, loaded)
            work.write_json(f"points/{point.name}/point.json", result)
            made += 1
        found.append(result["point"])
        is_last = number == len(points) and not loaded.speed
        data = _data(loaded, found, foreign, command, is_complete=is_last)
        _write(work, data)
    if loaded.speed:  # now that nothing else of the sweep runs
        found = [
            {**own, **speed_of(point, loaded)}
            for point, own in zip(points, found, strict=True)
        ]
        data = _data(loaded, found, foreign, command, is_complete=True)
        _write(work, data)
    return Sweep(data, work.root)


def _data(
    loaded: SweepConfig,
    found: Sequence[Mapping[str, Any]],
    foreign: Sequence[Mapping[str, Any]],
    command: str | None,
    *,
    is_complete: bool,
) -> dict[str, Any]:
    return {
        "version": 1,
        "config": loaded.model_dump(mode="json"),
        "command": command or "compress.sweep(config)",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": provenance.versions(),
        "points": with_front(found),
        "foreign": list(foreign),
        "is_complete": is_complete,
    }


def _write(work: WorkDir, data: Mapping[str, Any]) -> None:
    """Write what is known so far, so that a long sweep can be watched."""
    work.write_json("sweep.json", data)
    write_atomically(work.root / "pareto.svg", render_svg(data).encode())
    write_atomically(work.root / "sweep.html", render_sweep(data).encode())
    if can_draw():
        write_atomically(work.root / "pareto.png", render_png(data))


def _time_left(seconds: float, made: int, waiting: int) -> str:
    """Return how long the rest takes if points take what they took; empty at first."""
    if not made:
        return ""
    return f", about {duration(seconds / made * (waiting - made))} left"


def _digest(point: SweepPoint, loaded: SweepConfig) -> str:
    config = point.config.model_dump(mode="json")
    version = provenance.versions()["compress"]
    return provenance.digest_of([config, loaded.export, version])


def _finished(point: SweepPoint, loaded: SweepConfig) -> dict[str, Any] | None:
    path = loaded.workdir / "points" / point.name / "point.json"
    if not path.is_file():
        return None
    try:
        stored: dict[str, Any] = parse_json(path.read_text("utf-8"))
        return stored if stored["with"] == _digest(point, loaded) else None
    except (OSError, *MALFORMED) as error:
        _log.warning("%s is damaged and made again: %s", path, error)
        return None


def _check(points: Sequence[SweepPoint]) -> None:
    """Raise all that can be known before work: no export, or a budget too small."""
    problems = []
    for point in points:
        try:
            pipeline.plan(point.config)
        except ConfigError as error:
            problems.append(f"{point.name}: {error}")
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def _run(point: SweepPoint, loaded: SweepConfig) -> dict[str, Any]:
    config, folder = point.config, point.config.run.workdir
    found: dict[str, Any] = {
        "name": point.name,
        "model": config.model.path,
        "size": point.size,
        "settings": dict(point.settings),
    }
    if config.evaluate is None and not loaded.export:
        outcome = searching.search(config)
        WorkDir(folder).write_json("search.json", outcome.to_dict())
        measured = {"text": SEARCH_TEXT, "kl": outcome.record["measured_kl"]}
        found |= _searched(outcome.record) | measured | {"failures": []}
    else:
        result = pipeline.run(config, resume=True, write_exports=loaded.export)
        found |= _of_report(result.report) | {"failures": result.failures}
    found["workdir"] = str(folder)
    return {"with": _digest(point, loaded), "point": found}


def _searched(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a search says of its point."""
    return {
        "budget_bytes": record["budget_bytes"],
        "bytes": record["file_bytes"],
        "predicted_kl": record["predicted_kl"],
        "search_kl": record["measured_kl"],
        "evaluations": record["evaluations"],
        "seconds": sum(record["seconds"].values()),
    }


def _of_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run says of its point, and of the original beside it."""
    record = report["allocation"]
    found: dict[str, Any] = {}
    if record is None:
        name = report["config"]["export"][0]["format"]
        found["bytes"] = report["predicted"]["size_bytes"][name]
    else:
        name = record["format"]
        found |= _searched(record)
    if name in report["exports"]:
        found["bytes"] = report["exports"][name]["size_bytes"]
    base = report["metrics"]["base"]
    if base is not None and base["texts"]:
        figures = next(iter(base["texts"].values()))
        found["original"] = {
            "bytes": report["size_bytes"]["base"],
            "bits_per_byte": figures["bits_per_byte"],
        }
    found["seconds"] = sum(report["seconds"].values())
    return found | _measured(report, record)


def _measured(
    report: Mapping[str, Any], record: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the first text that was evaluated, and the figures on it."""
    texts = (report["metrics"]["compressed"] or {}).get("texts", {})
    for name, figures in texts.items():
        if "kl" in figures:
            kept = {key: figures[key] for key in _FIGURES if key in figures}
            return {"text": name, **kept}
    assert record is not None  # sweep_points checks it
    return {"text": SEARCH_TEXT, "kl": record["measured_kl"]}


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
