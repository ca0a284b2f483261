"""A checkpoint and one whole run that several files look at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pipeline_fixtures import (
    BOTH,
    Ground,
    call,
    save_checkpoint,
    write_config,
    write_text,
)


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("pipeline")
    save_checkpoint(folder / "tiny", dtype=torch.float16, shard="100KB")
    return Ground(folder, folder / "tiny", write_text(folder))


@pytest.fixture(scope="session")
def full(ground: Ground) -> Path:
    """A run from a YAML file through the command line, to both formats, verified."""
    config = ground.config("full", export=BOTH, run={"verify": True})
    result = call("run", write_config(ground.folder / "full.yaml", config))
    assert result.exit_code == 0, result.output
    return ground.folder / "full"


@pytest.fixture
def llama_cpp() -> None:
    pytest.importorskip("llama_cpp")
