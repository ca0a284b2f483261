"""Types and checks that the config's sections share."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from compress.core.errors import SchemeError
from compress.core.scheme import Scheme

DENSE = "dense"
"""The scheme of an override that keeps a layer as it is."""
_DURATION = re.compile(r"(\d+(?:\.\d+)?) ?(s|min|h)")
_UNITS = {"s": 1 / 60, "min": 1.0, "h": 60.0}


def _path_text(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def check_scheme(name: str) -> str:
    """Return the name of a scheme if it is one; a ``ValueError`` otherwise."""
    if name == DENSE:
        raise ValueError(
            f"{DENSE!r} is for single layers, under quantize.overrides; "
            "leave the section quantize out to keep the whole model"
        )
    try:
        Scheme.parse(name)
    except SchemeError as error:
        raise ValueError(str(error)) from None
    return name


def minutes_of(duration: str) -> float:
    """Return the minutes of ``90s``, ``30min`` or ``2h``; ``ValueError`` for others."""
    match = _DURATION.fullmatch(duration)
    minutes = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if minutes <= 0:
        raise ValueError(f"{duration!r} is no time; write 90s, 30min or 2h")
    return minutes


def _check_duration(duration: str) -> str:
    minutes_of(duration)
    return duration


Duration = Annotated[str, AfterValidator(_check_duration)]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, BeforeValidator(_path_text)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are fixed and typed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
