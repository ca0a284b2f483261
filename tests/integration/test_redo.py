"""A config that has changed: only what it affects is computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pipeline_fixtures import (
    call,
    config_of,
    digests,
    save_checkpoint,
    write_config,
    write_text,
)

import compress
from compress.core.errors import ConfigError

TRAINING = {
    "steps": 4,
    "samples": 20,
    "held_out": 2,
    "sequence_length": 16,
    "batch": 4,
    "evaluations": 2,
}
STAGES = ("pruned", "recovered", "blocks", "tuned")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("redo")
    save_checkpoint(folder / "model", initializer_range=0.15)
    write_text(folder)
    return folder


def config(ground: Path, workdir: Path, **changes: Any) -> dict[str, Any]:
    sections: dict[str, Any] = {
        "prune": {"method": "cfsp", "sparsity": 0.3, "round_to": 32},
        "recover": {"options": TRAINING},
        "tune": {"options": TRAINING},
        "evaluate": None,
    }
    for name, value in changes.items():
        sections[name] = {**sections.get(name, {}), **value}
    return config_of(ground / "model", ground / "text.txt", workdir, **sections)


def stamps(workdir: Path) -> dict[str, set[int]]:
    """Return when the weight files of each stage were written."""
    return {
        stage: {p.stat().st_mtime_ns for p in (workdir / stage).glob("*.safetensors")}
        for stage in STAGES
    }


CHANGES = {
    "tune": ({"tune": {"options": TRAINING | {"seed": 1}}}, STAGES[:3]),
    "quantize": (
        {"quantize": {"overrides": {"model.layers.1.mlp.up_proj": {"scheme": "int8"}}}},
        STAGES[:2],
    ),
    "recover": ({"recover": {"options": TRAINING | {"seed": 1}}}, STAGES[:1]),
    "prune": ({"prune": {"sparsity": 0.4}}, ()),
    "calibration": ({"calibration": {"seed": 1}}, ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_only_what_a_change_affects_is_made_again(
    name: str, ground: Path, tmp_path: Path
) -> None:
    changes, kept = CHANGES[name]
    compress.run(config(ground, tmp_path / "run"))
    before = stamps(tmp_path / "run")
    changed = config(ground, tmp_path / "run", **changes)
    with pytest.raises(ConfigError, match=f"{name}.* changed .*--redo keeps what"):
        compress.run(changed, resume=True)
    assert stamps(tmp_path / "run") == before
    compress.run(changed, redo=True)
    after = stamps(tmp_path / "run")
    for stage in STAGES:
        if stage in kept:
            assert after[stage] == before[stage]
        else:
            assert not after[stage] & before[stage]
    compress.run(config(ground, tmp_path / "fresh", **changes))
    fresh = digests(tmp_path / "fresh" / "export")
    assert digests(tmp_path / "run" / "export") == fresh


def test_redo_without_a_change_computes_nothing(ground: Path, tmp_path: Path) -> None:
    settings = config(ground, tmp_path / "run")
    for section in ("prune", "recover", "tune"):
        del settings[section]
    compress.run(settings)
    before = stamps(tmp_path / "run")
    path = write_config(tmp_path / "run.yaml", settings)
    assert call("run", path, "--redo").exit_code == 0
    assert stamps(tmp_path / "run") == before
