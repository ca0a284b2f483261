"""The section ``tune``: training of codes, end to end, after they are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from compress.config.fields import Section, Text
from compress.config.training_options import TrainingOptions

_SHORT_MINUTES = 60.0
_SHORT_STEPS = 2000
_BITS = 2.0  # of a weight's codes, that rates are given for


class TuneOptions(TrainingOptions):
    """What all methods of tuning share."""

    stage = "tuning"
    section = "tune"

    norms: bool = Field(default=True, description="Train the weights of norms as well.")
    embeddings: bool = Field(
        default=False,
        description="Train the embedding as well, and a head that is not coded; a "
        "tied one once. What is dense stays dense. A coded head of its own is tuned "
        "in any case.",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Of everything but codes, at its highest: the relative change of a "
        "matrix's numbers in a step. null takes 1e-3 in a run of at most 60 minutes or "
        "2000 steps, and 3e-4 in a longer one.",
    )

    @property
    def is_short(self) -> bool:
        """Whether it ends within 60 minutes or 2000 steps."""
        short = self.seconds is not None and self.seconds <= 60 * _SHORT_MINUTES
        return short or (self.steps is not None and self.steps <= _SHORT_STEPS)

    @property
    def rate(self) -> float:
        """Learning rate of everything but codes."""
        return self.learning_rate or (1e-3 if self.is_short else 3e-4)


class PVOptions(TuneOptions):
    """Options of ``pv``: codes change where the loss asks for it most."""

    summary = "trains scales and tables by gradients, and chooses codes again (PV)"

    regime: Literal["pv", "p", "ste", "linearized", "subspace"] = Field(
        default="pv",
        description="pv changes few codes in a step and keeps what the others want; p "
        "changes no codes; ste may change all (straight-through); linearized may "
        "change all and keeps nothing; subspace changes few and keeps nothing.",
    )
    code_learning_rate: float | None = Field(
        default=None,
        ge=0,
        description="Relative change that codes are asked for in a step, at its "
        "highest; null takes 1e-2 in a short run and 3e-3 in a longer one for codes of "
        "two bits a weight, half as much for each bit more, and ten times as much "
        "where wishes do not add up (linearized, subspace).",
    )
    max_code_change: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="For pv and subspace: share of a matrix's codes that may change "
        "in a step (tau); null takes 0.1 in a short run and 0.01 in a longer one.",
    )
    delta_decay: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="For pv and ste: share of what is kept that is dropped in a step.",
    )
    trust_ratio: float | None = Field(
        default=None,
        gt=0,
        description="Largest change of a matrix by its codes in a step, relative to "
        "the matrix; null for no limit.",
    )
    beam: int = Field(
        default=1,
        ge=1,
        description="Candidates in the search for codes of several tables.",
    )
    shard: bool = Field(
        default=False,
        description="Under torchrun, split the matrices of the blocks, codes and all "
        "that is kept for them, by rows over the processes (FSDP2): for models that "
        "outgrow one GPU.",
    )

    @model_validator(mode="after")
    def _means_something(self) -> PVOptions:
        for key, regimes in (
            ("max_code_change", ("pv", "subspace")),
            ("delta_decay", ("pv", "ste")),
        ):
            if getattr(self, key) is not None and self.regime not in regimes:
                raise ValueError(
                    f"{key} means nothing for regime {self.regime}; leave it out, or "
                    f"take regime {' or '.join(regimes)}"
                )
        return self

    @model_validator(mode="after")
    def _can_be_split(self) -> PVOptions:
        if self.shard and (self.writes or self.teacher == "cache"):
            raise ValueError(
                "shard: each process has a part of the original only, so give "
                "generated: 0 (and more samples) and teacher: recompute"
            )
        return self

    @property
    def changes_codes(self) -> bool:
        """Whether codes are chosen again at all."""
        return self.regime != "p"

    @property
    def keeps_wishes(self) -> bool:
        """Whether what units want is added up from step to step."""
        return self.regime in ("pv", "ste")

    def code_rate(self, bits: float) -> float:
        """Return the learning rate of codes.

        Levels lie half as far from each other with each bit, and so far do steps go.

        Args:
            bits: Of the codes of a weight.
        """
        if self.code_learning_rate is not None:
            return self.code_learning_rate
        rate = (1e-2 if self.is_short else 3e-3) * 2 ** (_BITS - bits)
        return rate if self.keeps_wishes else 10 * rate

    @property
    def share(self) -> float:
        """Share of a matrix's codes that may change in a step."""
        if self.regime in ("ste", "linearized"):
            return 1.0
        return self.max_code_change or (0.1 if self.is_short else 0.01)


class EdkmOptions(TuneOptions):
    """Options of ``edkm``: weights learn through palettes that follow them."""

    summary = "trains weights through soft k-means, then the tables (DKM, eDKM)"

    weight_learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Relative change of a matrix's weights in a step, at its highest; "
        "null takes 5e-4 in a short run and 2e-4 in a longer one. Steps of few tokens "
        "need small ones.",
    )
    softness: float = Field(
        default=0.05,
        gt=0,
        description="At the start: how wide the blur between neighbouring entries of a "
        "table is, relative to their distance.",
    )
    last_softness: float = Field(
        default=0.002, gt=0, description="The same right before codes are fixed."
    )
    iterations: int = Field(
        default=1,
        ge=0,
        description="Rounds of soft k-means in a step; tables go on from where the "
        "last step left them.",
    )
    table_share: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="Share of the run, at its end, that trains tables under fixed "
        "codes.",
    )

    @model_validator(mode="after")
    def _hardens(self) -> EdkmOptions:
        if self.last_softness > self.softness:
            raise ValueError(
                f"last_softness is {self.last_softness:g}, above softness "
                f"{self.softness:g}; it has to fall"
            )
        return self

    @property
    def weight_rate(self) -> float:
        """Learning rate of master weights."""
        return self.weight_learning_rate or (5e-4 if self.is_short else 2e-4)


TUNINGS: Mapping[str, type[TuneOptions]] = {"pv": PVOptions, "edkm": EdkmOptions}


class TuneSection(Section):
    """Training of codes towards the original model, after quantizing."""

    method: Text = Field(default="pv", description="pv or edkm.")
    options: dict[str, Any] = Field(default={}, description="Options of the method.")
