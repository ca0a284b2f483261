"""How fast the files of a sweep write, beside their originals, one at a time.

Speed is measured after all points are made, when nothing else of the sweep runs. Each
point takes turns with an unquantized file of its model in three rounds, so that what
else the machine does meets both: the ratio is steadier than either rate.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress import pipeline, provenance
from compress.config import SweepConfig
from compress.config.schema import Config
from compress.config.sweep_points import SweepPoint
from compress.core.errors import MissingDependencyError
from compress.core.foreign import MALFORMED, parse_json
from compress.model.loading import locate
from compress.scoring import generation_speeds
from compress.workdir import WorkDir

_log = logging.getLogger(__name__)
_ROUNDS = 3
_QUIET = 0.25
"""Spread of rounds, over their median, beyond which a speed is not kept."""


def check_speed(loaded: SweepConfig) -> None:
    """Raise if a sweep wants speed that cannot be measured here.

    Raises:
        MissingDependencyError: llama-cpp-python is not installed.
    """
    if loaded.speed and find_spec("llama_cpp") is None:
        raise MissingDependencyError(
            "llama-cpp-python", extra="verify", purpose="the speed of GGUF files"
        )


def speed_of(point: SweepPoint, loaded: SweepConfig) -> dict[str, float]:
    """Return tokens a second of a point's file, and of the original beside it.

    What was measured before is not measured again while files and settings are the
    same, unless the machine was busy then.

    Raises:
        ExportError: llama.cpp refuses a file, or crashes.
    """
    folder = point.config.run.workdir
    (file,) = (folder / "export" / "gguf").glob("*.gguf")
    original = _original(point.config, loaded.workdir)
    key = _digest(file, original, loaded.speed)
    stored = folder.parent / "speed.json"
    found = _stored(stored, key)
    if found is None:
        _log.info("speed of %s", point.name)
        found = _measured(file, original, loaded.speed)
        rate, spread = found["tokens_per_second"], found["tokens_per_second_spread"]
        if spread <= _QUIET * rate:
            kept = {"with": key, "speed": found}
            WorkDir(folder.parent).write_json(stored.name, kept)
        else:
            _log.warning(
                "%s: %.1f tokens/s, but rounds are up to %.1f apart: the machine was "
                "busy; the same command measures it again",
                *(point.name, rate, spread),
            )
    return found


def _measured(file: Path, original: Path, tokens: int) -> dict[str, float]:
    own: list[float] = []
    base: list[float] = []
    for _ in range(_ROUNDS):
        base += generation_speeds(original, tokens=tokens, repeats=1)
        own += generation_speeds(file, tokens=tokens, repeats=1)
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    return {
        "tokens_per_second": statistics.median(own),
        "tokens_per_second_spread": max(own) - min(own),
        "original_tokens_per_second": statistics.median(base),
        "times_original": statistics.median(ratios),
    }


def _original(config: Config, workdir: Path) -> Path:
    """Return a GGUF file of a point's model, in float16; made once for all points."""
    path = config.model.path
    if path.endswith(".gguf"):
        return locate(path)
    name = f"{Path(path).name.removeprefix('builtin:')}-"
    name += hashlib.sha256(path.encode()).hexdigest()[:8]
    folder = workdir / "originals" / name
    made = sorted((folder / "export" / "gguf").glob("*.gguf"))
    if made and (folder / "report.json").is_file():
        return made[0]
    _log.info("writing an unquantized file of %s, to be timed beside the points", path)
    model = {**config.model.model_dump(mode="json"), "dtype": "float16"}
    pipeline.run(
        {
            "model": model,
            "export": [{"format": "gguf", "embedding": "f16"}],
            "run": {"workdir": str(folder), "verify": False, "device": "cpu"},
        },
        overwrite=True,
    )
    (file,) = (folder / "export" / "gguf").glob("*.gguf")
    return file


def _digest(file: Path, original: Path, tokens: int) -> str:
    states = [
        [p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in (file, original)
    ]
    return provenance.digest_of([states, tokens, provenance.versions()])


def _stored(path: Path, key: str) -> dict[str, float] | None:
    if not path.is_file():
        return None
    try:
        stored: Mapping[str, Any] = parse_json(path.read_text("utf-8"))
        return dict(stored["speed"]) if stored["with"] == key else None
    except (OSError, *MALFORMED) as error:
        _log.warning("%s is damaged and made again: %s", path, error)
        return None
