"""Options of training towards the original model, which several sections share."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from compress.config.fields import Duration, Section, minutes_of

_MINUTES = 10.0
_WRITING = 0.1
"""Share of ``time`` in which the original writes text."""


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

    time: Duration | None = Field(
        default=None,
        description="Everything by one number, such as 30min or 2h: minutes of that "
        "length, in the first tenth of which the original writes text (generated).",
    )
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
    generated: int | None = Field(
        default=None,
        ge=0,
        description="Windows that the original model writes itself, beginning with a "
        "few tokens of the others, to train on besides: more text than the sources "
        "have. null takes none, or with time as many as it can.",
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
    compile: bool = Field(
        default=False,
        description="Compile the blocks of both models (torch.compile): takes a C "
        "compiler and some seconds for each width; then steps on a GPU are faster.",
    )
    teacher: Literal["recompute", "cache"] = Field(
        default="recompute",
        description="cache keeps the original model's last hidden states of every "
        "window once they were computed, for runs that see windows often: on the GPU "
        "if they take at most two fifths of its memory, else in host memory.",
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

    @model_validator(mode="after")
    def _compiles_whole_blocks(self) -> TrainingOptions:
        for key in ("gradient_checkpointing", "shard"):
            if self.compile and getattr(self, key, False):
                raise ValueError(f"compile does not go with {key}; give one of them")
        return self

    @model_validator(mode="after")
    def _has_one_length(self) -> TrainingOptions:
        if self.time is not None and self.minutes is not None:
            raise ValueError(f"time: {self.time} and minutes; give one of them")
        return self

    @property
    def writing_seconds(self) -> float | None:
        """In which the original writes text, if no number of windows is given."""
        if self.time is None or self.generated is not None:
            return None
        return _WRITING * 60 * minutes_of(self.time)

    @property
    def writes(self) -> bool:
        """Whether the original writes text at all."""
        return bool(self.generated) or self.writing_seconds is not None

    @property
    def seconds(self) -> float | None:
        """When time ends the run, if it does."""
        minutes = self.minutes
        if self.time is not None:
            minutes = minutes_of(self.time)
        if minutes is None and self.steps is None:
            minutes = _MINUTES
        return None if minutes is None else 60 * minutes
