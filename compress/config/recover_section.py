"""The section ``recover``: training that gives back what pruning took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from compress.config.fields import Section, Text

_MINUTES = 10.0


class RecoverOptions(Section):
    """What all methods of recovery share: text, loss and schedule."""

    summary: ClassVar[str]

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
    seed: int = Field(default=0, ge=0, description="Of windows, order and adapters.")
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
    learning_rate: float = Field(default=2e-4, gt=0, description="At its highest.")
    warmup: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="Share of the run in which the rate rises; it falls by a cosine "
        "afterwards.",
    )
    clip: float = Field(default=1.0, gt=0, description="Largest norm of a gradient.")
    evaluations: int = Field(
        default=20, ge=1, description="How often the held-out KL is measured."
    )
    patience: int = Field(
        default=6, ge=1, description="Evaluations without a better KL that end the run."
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
    def _has_a_loss(self) -> RecoverOptions:
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


class DistillOptions(RecoverOptions):
    """Options of ``distill``: weights are trained, and stay dense."""

    summary = "trains the weights to predict what the original model predicts"

    train: Literal["lora", "full"] = Field(
        default="lora",
        description="lora trains low-rank changes of the linear layers, merged at the "
        "end; full trains all weights of the blocks, better for small models.",
    )
    rank: int = Field(
        default=32,
        ge=2,
        multiple_of=2,
        description="For lora: mean rank of the blocks; important ones get more.",
    )
    lora_plus: float = Field(
        default=8.0,
        gt=0,
        description="For lora: learning rate of B over that of A (LoRA+).",
    )
    norms: bool = Field(
        default=True, description="For lora: train the weights of norms as well."
    )


class SoftPromptOptions(RecoverOptions):
    """Options of ``soft_prompt``: no weight changes; virtual tokens are trained."""

    summary = "trains virtual tokens that are put before every text; no weight changes"

    tokens: int = Field(default=64, ge=1, description="Number of virtual tokens.")
    learning_rate: float = Field(default=1e-3, gt=0, description="At its highest.")


RECOVERIES: Mapping[str, type[RecoverOptions]] = {
    "distill": DistillOptions,
    "soft_prompt": SoftPromptOptions,
}


class RecoverSection(Section):
    """Training after pruning, before anything is quantized."""

    method: Text = Field(default="distill", description="distill or soft_prompt.")
    options: dict[str, Any] = Field(default={}, description="Options of the method.")
