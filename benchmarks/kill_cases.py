"""The runs that ``kill.py`` breaks: one config for each kind of stage."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from pipeline_fixtures import config_of  # noqa: E402

TRAINING = {
    "steps": 30,
    "samples": 40,
    "held_out": 4,
    "sequence_length": 16,
    "batch": 4,
    "evaluations": 10,
    "checkpoint_minutes": 0,
    "generated": 8,
}
BOTH = [{"format": "safetensors", "max_shard_size": "60KB"}, {"format": "gguf"}]
CODED = {"method": "gptq", "scheme": "int4-g32"}
PRUNED = {"prune": {"method": "cfsp", "sparsity": 0.3, "round_to": 32}}


@dataclass(frozen=True)
class Kind:
    """A kind of stage.

    Attributes:
        stages: Names under which the run counts its time.
        sections: Of the config.
    """

    stages: tuple[str, ...]
    sections: Mapping[str, Any]


KINDS = {
    "calibration cache": Kind(("calibration text",), {}),
    "transforms": Kind(("transform",), {"transforms": ["rotation", "smoothquant"]}),
    "pruning": Kind(("prune",), PRUNED),
    "recovery": Kind(("recover",), PRUNED | {"recover": {"options": TRAINING}}),
    "level database": Kind(("levels",), {"budget": {"bits_per_weight": 8.0}}),
    "search": Kind(("sensitivity", "search"), {"budget": {"bits_per_weight": 8.0}}),
    "RL search": Kind(("search",), {"budget": {"bits_per_weight": 8.0}}),
    "quantization": Kind(("quantize",), {}),
    "PV tuning": Kind(("tune",), {"tune": {"options": TRAINING}}),
    "eDKM tuning": Kind(("tune",), {"tune": {"method": "edkm", "options": TRAINING}}),
    "evaluation": Kind(("evaluate",), {}),
    "export safetensors": Kind(("export safetensors",), {}),
    "export gguf": Kind(("export gguf",), {}),
}
_SEARCHED = {
    "method": "evolution",
    "schemes": ["q4_0", "q5_0", "q8_0"],
    "samples": 8,
    "windows": 2,
    "options": {"evaluations": 60, "offspring": 8},
}
_LEARNED = {
    "method": "ramp",
    "options": {
        "warm_up": 4,
        "episodes": 12,
        "hidden": [32, 32],
        "gradient_steps": 4,
        "batch": 16,
    },
}


def config(kind: str, work: Path, workdir: Path) -> dict[str, Any]:
    """Return the config of a kind; exports everything that can hold its codes.

    Args:
        kind: In ``KINDS``.
        work: Folder of model and text.
        workdir: Of the run.
    """
    sections: dict[str, Any] = {"export": BOTH, **KINDS[kind].sections}
    if "budget" in sections:
        sections |= {"quantize": {"method": "gptq", "scheme": None}}
        search = _SEARCHED | (_LEARNED if kind == "RL search" else {})
        sections |= {"allocate": search, "export": BOTH[1:]}
    elif kind == "eDKM tuning":
        sections["quantize"] = {"method": "kmeans", "scheme": "palette2"}
        sections["export"] = [{"format": "palette"}]
    made = config_of(work / "model", work / "text.txt", workdir, **sections)
    if "budget" in sections:
        del made["quantize"]["scheme"]
    return made
