"""The config of a sweep: one base, several budgets, and what else is varied."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Field, Tag

from compress.config.budget_sections import budget_assignments
from compress.config.fields import PathText, Section, Text
from compress.core.errors import ConfigError


def _check_budget(text: str) -> str:
    try:
        budget_assignments(text)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return text


def _kind_of_base(value: object) -> str:
    return "<config>" if isinstance(value, dict) else "<text>"


class SweepConfig(Section):
    """Runs of one config under several budgets, on one level database."""

    base: Annotated[
        Annotated[PathText, Tag("<text>")] | Annotated[dict[str, Any], Tag("<config>")],
        Discriminator(_kind_of_base),
    ] = Field(description="A config: its file, or the same as a mapping.")
    budgets: Annotated[
        tuple[Annotated[Text, AfterValidator(_check_budget)], ...],
        Field(strict=False, min_length=1),
    ] = Field(description="Sizes of the file, such as 95MB, 4.25bpw or 0.3x.")
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
    points: PathText | None = Field(
        default=None,
        description="JSON file with a list of {name, bytes, kl}: files of other tools, "
        "measured on the same text, to be drawn beside.",
    )
    workdir: Annotated[Path, Field(strict=False)] = Field(
        default=Path("runs/sweep"), description="Folder of results; a folder a point."
    )
