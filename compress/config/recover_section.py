"""The section ``recover``: training that gives back what compression took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from compress.config.fields import PathText, Section, Text
from compress.config.training_options import TrainingOptions


class RecoverOptions(TrainingOptions):
    """What all methods of recovery share."""

    stage = "recovery"
    section = "recover"

    learning_rate: float = Field(default=2e-4, gt=0, description="At its highest.")
    clip: float = Field(default=1.0, gt=0, description="Largest norm of a gradient.")
    shard: bool = Field(
        default=False,
        description="Under torchrun, split the matrices of the blocks, and what is "
        "kept for them, over the processes (FSDP2): for models that outgrow one GPU.",
    )

    @model_validator(mode="after")
    def _can_be_split(self) -> RecoverOptions:
        if self.shard and self.writes:
            raise ValueError(
                "generated: text is written by one process, which needs the whole "
                "model; with shard, give 0, and more samples instead"
            )
        if self.shard and self.teacher == "cache":
            raise ValueError(
                "teacher: cache keeps what one process has computed, and with shard "
                "all compute together; give recompute"
            )
        return self


class DistillOptions(RecoverOptions):
    """Options of ``distill``: weights are trained, and stay dense."""

    summary = "trains the weights to predict what the original model predicts"

    train: Literal["lora", "full"] = Field(
        default="lora",
        description="lora trains low-rank changes of the linear layers, merged at the "
        "end; full trains all weights of the blocks, better for small models.",
    )
    embeddings: bool = Field(
        default=False,
        description="For full: train embedding and head as well; a tied one once.",
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

    @model_validator(mode="after")
    def _trains_embeddings_whole(self) -> DistillOptions:
        if self.embeddings and self.train != "full":
            raise ValueError(
                "embeddings are trained with train: full; lora leaves them as they are"
            )
        return self


class SoftPromptOptions(RecoverOptions):
    """Options of ``soft_prompt``: no weight changes; virtual tokens are trained."""

    summary = "trains virtual tokens that are put before every text; no weight changes"

    tokens: int | None = Field(
        default=None,
        ge=1,
        description="Number of virtual tokens: 64, or as many as start has.",
    )
    start: PathText | None = Field(
        default=None,
        description="Folder of a prompt to begin with, such as one that was learned "
        "on another size of the same model; null begins with the first tokens of the "
        "vocabulary.",
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="At its highest.")

    @model_validator(mode="after")
    def _has_one_length_of_prompt(self) -> SoftPromptOptions:
        if self.tokens is not None and self.start is not None:
            raise ValueError(
                f"tokens: {self.tokens} and start, which has a number of its own; give "
                "one of them"
            )
        return self


RECOVERIES: Mapping[str, type[RecoverOptions]] = {
    "distill": DistillOptions,
    "soft_prompt": SoftPromptOptions,
}


class RecoverSection(Section):
    """Training that gives back what compression took.

    `distill` trains the pruned model, before anything is quantized; `soft_prompt`
    trains virtual tokens for the model as it ends, pruned and quantized.
    """

    method: Text = Field(default="distill", description="distill or soft_prompt.")
    options: dict[str, Any] = Field(default={}, description="Options of the method.")

    @property
    def trains_weights(self) -> bool:
        """Whether another model comes out, which the rest of a run goes on with."""
        return self.method != "soft_prompt"
