"""What is known of a fault."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A fault of one file.

    Attributes:
        kind: Its name.
        file: Relative to the folder.
        text: What is wrong, what comes of it, and what to do if it stays.
        mendable: Whether ``compress doctor`` can mend it.
    """

    kind: str
    file: str
    text: str
    mendable: bool = True
