"""The config of a sweep: one base, several sizes, and what else is varied."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from compress.config.budget_sections import budget_assignments
from compress.config.fields import PathText, Section, Text, check_scheme
from compress.core.errors import ConfigError
from compress.core.sizes import parse_size


def _check_budget(text: str) -> str:
    try:
        budget_assignments(text)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return text


def _check_size(text: str) -> str:
    parse_size(text)
    return text


def _kind_of_base(value: object) -> str:
    return "<config>" if isinstance(value, dict) else "<text>"


class SweepConfig(Section):
    """Runs of one config under several budgets, on one level database."""

    base: Annotated[
        Annotated[PathText, Tag("<text>")] | Annotated[dict[str, Any], Tag("<config>")],
        Discriminator(_kind_of_base),
    ] = Field(description="A config: its file, or the same as a mapping.")
    models: Annotated[tuple[PathText, ...], Field(strict=False)] = Field(
        default=(), description="Models to take in the place of the base's."
    )
    sparsities: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(strict=False)
    ] = Field(
        default=(),
        description="Values of the base's prune.sparsity; 0 prunes and recovers "
        "nothing. Points that prune alike share the pruned model.",
    )
    budgets: Annotated[
        tuple[Annotated[Text, AfterValidator(_check_budget)], ...], Field(strict=False)
    ] = Field(
        default=(), description="Sizes of the file, such as 95MB, 4.25bpw or 0.3x."
    )
    schemes: Annotated[
        tuple[Annotated[Text, AfterValidator(check_scheme)], ...], Field(strict=False)
    ] = Field(
        default=(),
        description="Schemes that all layers get, without a search; points beside "
        "those of the budgets.",
    )
    set: dict[Text, Annotated[tuple[Any, ...], Field(strict=False, min_length=1)]] = (
        Field(
            default={},
            description="Values that keys of the base take, as with --set; every "
            "combination of them is run under every budget.",
        )
    )
    export: bool = Field(
        default=False, description="Write and verify the base's exports of each point."
    )
    speed: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="Tokens that llama.cpp writes with each point's GGUF file, timed "
        "three times in turns with the original's, once all points are made; 0 "
        "measures no speed.",
    )
    fits: Annotated[
        tuple[Annotated[Text, AfterValidator(_check_size)], ...], Field(strict=False)
    ] = Field(
        default=(),
        description="Sizes, such as 1GB, for which the sweep names the best point.",
    )
    points: PathText | None = Field(
        default=None,
        description="JSON file with a list of {name, bytes, kl}: files of other tools, "
        "measured on the same text, to be drawn beside.",
    )
    workdir: Annotated[Path, Field(strict=False)] = Field(
        default=Path("runs/sweep"), description="Folder of results; a folder a point."
    )

    @model_validator(mode="after")
    def _has_points(self) -> SweepConfig:
        if not (self.budgets or self.schemes):
            raise ValueError("give budgets, schemes or both")
        if self.speed and not self.export:
            raise ValueError("speed is that of exported files; set export: true")
        return self
