"""The search under a budget alone, of which nothing is carried out."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress import preparing
from compress.allocation.outcome import Outcome
from compress.config import Config
from compress.core.errors import ConfigError
from compress.pipeline import Run, with_pruned


def search(config: Config | Mapping[str, Any] | str | Path) -> Outcome:
    """Return the plan that the search under a config's budget chooses.

    Levels and sensitivities stay in the cache, for the run or for another budget;
    nothing else is written.

    Raises:
        ConfigError: The config has no budget.
        AllocationError: The smallest choices exceed it.
    """
    loaded = preparing.prepared(config)
    if loaded.budget is None:
        raise ConfigError(
            "there is nothing to search without a budget; give --budget 95MB, or add "
            "budget: {bytes: 95MB} to the config"
        )
    with tempfile.TemporaryDirectory() as folder:
        section = loaded.run.model_copy(update={"workdir": Path(folder)})
        current = Run(loaded.model_copy(update={"run": section}))
        if current.pruning is not None:
            current = with_pruned(current, overwrite=False)
        return current.search_only()
