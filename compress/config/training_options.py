"""Options of training towards the original model, which several sections share."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from compress.config.fields import Section

_MINUTES = 10.0


class TrainingOptions(Section):
    """What all training towards the original model shares: text, loss and schedule.

    Attributes:
        summary: One line for people.
        stage: What messages call the training.
        section: Key of the config that the options are under.
    """

    summary: ClassVar[str]
    stage: ClassVar[str]
    section: ClassVar[str]

    minutes: float | None = Field(
        default=None,
        gt=0,
        description="Stop after this long, text of the teacher's own included; if "
        "neither this nor steps is given, after 10.",
    )
    steps: int | None = Field(
        default=None,
        ge=1,
        description="Stop after so many steps; with minutes, what comes first ends "
        "the run.",
    )
    samples: int = Field(
        default=512, ge=1, description="Windows of calibration.data to train on."
    )
    held_out: int = Field(
        default=32,
        ge=1,
        description="Further windows of it, which only choose the best step.",
    )
    generated: int = Field(
        default=0,
        ge=0,
        description="Windows that the original model writes itself, beginning with a "
        "few tokens of the others, to train on besides: more text than the sources "
        "have.",
    )
    sequence_length: int = Field(default=512, ge=2, description="Tokens in a window.")
    seed: int = Field(
        default=0,
        ge=0,
        description="Of windows, order and whatever is random at the start.",
    )
    batch: int = Field(
        default=16, ge=1, description="Windows in one pass, on each device."
    )
    accumulate: int = Field(default=1, ge=1, description="Passes in one step.")
    kl: float = Field(
        default=1.0, ge=0, description="Weight of the KL from the original model."
    )
    ce: float = Field(
        default=0.0, ge=0, description="Weight of the cross-entropy to the text."
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Divides the logits of both models in the KL."
    )
    warmup: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="Share of the run in which the rate rises; it falls by a cosine "
        "afterwards.",
    )
    evaluations: int = Field(
        default=20, ge=1, description="How often the held-out KL is measured."
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Evaluations without a better KL that end the run; null for no "
        "such end, since the best state often comes last, when the rate has fallen.",
    )
    checkpoint_minutes: float = Field(
        default=2.0,
        ge=0,
        description="Write a checkpoint at the first evaluation after this long.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Compute blocks twice instead of keeping them."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Arithmetic, as in calibration; what is trained is float32 always.",
    )

    @model_validator(mode="after")
    def _has_a_loss(self) -> TrainingOptions:
        if self.kl == 0 and self.ce == 0:
            raise ValueError("kl and ce are both 0; give one of the losses a weight")
        return self

    @property
    def seconds(self) -> float | None:
        """When time ends the run, if it does."""
        minutes = self.minutes
        if minutes is None and self.steps is None:
            minutes = _MINUTES
        return None if minutes is None else 60 * minutes
