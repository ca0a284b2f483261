"""The section ``run``: where results go, and how the machine is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from compress.config.budget_sections import check_size
from compress.config.fields import Section


class RunSection(Section):
    """Where results go, and how the machine is used."""

    workdir: Annotated[Path, Field(strict=False)] = Field(
        default=Path("runs/default"), description="Folder of results and checkpoints."
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="auto, cpu, mps, cuda or cuda:N.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of every random choice.")
    verify: bool = Field(
        default=True, description="Reopen each export with its consumer."
    )
    max_kl: float = Field(
        default=1e-3, gt=0, description="KL in nats that verify allows for an export."
    )
    max_memory: Annotated[int | str, AfterValidator(check_size)] | None = Field(
        default=None,
        description="Memory of the process that quantizing may take, such as 8GiB. If "
        "the prediction is more, states between blocks lie in a file of the work "
        "directory, and blocks see a few windows at a time.",
    )
    max_perplexity_ratio: float | None = Field(
        default=10.0,
        gt=1,
        description="A result whose perplexity is more than this many times the "
        "original's, on any text of evaluate, is not exported without --force; null "
        "for no limit.",
    )
    threads: int | None = Field(
        default=None, ge=1, description="Threads of the CPU; null leaves it to torch."
    )
