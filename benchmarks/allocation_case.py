"""One model with its level database: what allocators are compared on.

Levels are made by ``compress`` itself, once, and kept in a folder; embedding and head
stay dense and outside of the budget, which is in bits a weight of the decoder's linears
and counts their exact bytes in the file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from reference_kl import TEXTS, windows_of
from torch import Tensor

from compress.allocation.assemble import Assembly, assembled_model
from compress.config import load_config
from compress.core.allocation import AllocationProblem
from compress.model.loading import check_tensors
from compress.pipeline import Run

FORMATS = {
    "gguf": ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0"),
    "safetensors": tuple(f"int{bits}-g64" for bits in (2, 3, 4, 5, 6)),
}
OUTSIDE = r"re:.*(embed_tokens|lm_head)"


@dataclass(frozen=True)
class Settings:
    """What decides levels and reward.

    Attributes:
        model: Folder of the checkpoint.
        work: Folder that keeps levels and tokens.
        format: ``gguf``, where all rows are multiples of 256, or ``safetensors``.
        method: Quantizer of the levels.
        schemes: Choices of each layer; empty takes those of the format.
        samples: Calibration sequences of 512 tokens of the bundled mix.
        windows: Other sequences of the mix that searches measure on.
        length: Tokens in one of them.
        test_windows: Windows of each test text, of ``test_length`` tokens.
        test_length: At most 1024.
        device: Where all of it runs.
    """

    model: Path
    work: Path
    format: str = "gguf"
    method: str = "gptq"
    schemes: tuple[str, ...] = ()
    samples: int = 64
    windows: int = 16
    length: int = 256
    test_windows: int = 10
    test_length: int = 1024
    device: str = "cpu"

    def config(self) -> dict[str, Any]:
        """Return the config of a run under a budget."""
        dense: dict[str, Any] = {"scheme": "dense"}
        allocate = {
            "schemes": list(self.schemes or FORMATS[self.format]),
            "samples": min(64, self.samples),
            "windows": self.windows,
            "sequence_length": self.length,
        }
        return {
            "model": {"path": str(self.model)},
            "calibration": {
                "data": "mix",
                "samples": self.samples,
                "sequence_length": 512,
                "seed": 0,
            },
            "quantize": {"method": self.method, "overrides": {OUTSIDE: dense}},
            "budget": {"bits_per_weight": 16.0},  # each problem gets its own
            "allocate": allocate,
            "export": [{"format": self.format}],
            "run": {
                "workdir": str(self.work / "run"),
                "device": self.device,
                "seed": 0,
            },
        }

    def about(self) -> dict[str, Any]:
        """Return what must agree for two figures to stand in one table."""
        kept = asdict(self) | {"model": self.model.name}
        schemes = " ".join(self.schemes or FORMATS[self.format])
        del kept["work"], kept["device"]
        return kept | {"schemes": schemes}


class Case:
    """A model whose layers can take any of their levels.

    Making one makes the levels and predicted losses that are not in ``work`` yet.
    """

    def __init__(self, settings: Settings) -> None:
        settings.work.mkdir(parents=True, exist_ok=True)
        os.environ["COMPRESS_CACHE"] = str(settings.work.absolute())
        self.settings = settings
        self._run = Run(load_config(settings.config()))
        check_tensors(self._run.handle)
        tokens = self._run._calibration_tokens()
        assert self._run.search is not None and tokens is not None
        self._search = self._run.search
        self._problem = self._search.problem(tokens)

    @property
    def seconds(self) -> dict[str, float]:
        """Time that levels and predicted losses took; little if they were kept."""
        return dict(self._search.seconds)

    @property
    def weights(self) -> int:
        """Weights of all layers that have a choice."""
        return sum(unit.weights for unit in self._problem.units)

    def problem(self, bits: float, seed: int) -> AllocationProblem:
        """Return the problem at a budget in bits for each of :attr:`weights`."""
        budget = int(bits * self.weights / 8)
        return replace(self._problem, budget=budget, seed=seed)

    def bits(self, assignment: Sequence[int]) -> float:
        """Return the realised bits a weight."""
        return 8 * self._problem.bytes_of(assignment) / self.weights

    @cached_property
    def _test(self) -> Assembly:
        run, search, settings = self._run, self._search, self.settings
        tokenizer = run.handle.tokenizer()
        windows = torch.cat(
            [windows_of(text, tokenizer)[: settings.test_windows] for text in TEXTS]
        )[:, : settings.test_length]
        model = assembled_model(
            run.model,
            run.transformed.source,
            search._store,
            search._levels.keys(),
            device=run.device,
            dtype=torch.float32,
        )
        units = search.candidates.units
        options = [[option.layers for option in unit.options] for unit in units]
        return Assembly(model, windows.contiguous(), options, search._levels)

    def test(self, assignment: Sequence[int]) -> dict[str, list[float]]:
        """Return the KL of each window of each test text, nats a token."""
        found: Tensor = self._test.measure_windows(assignment)
        parts = found.view(len(TEXTS), -1).tolist()
        return {
            text: [round(kl, 6) for kl in part]
            for text, part in zip(TEXTS, parts, strict=True)
        }
