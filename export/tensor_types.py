r"""The types of a GGUF file, as ``llama-quantize --tensor-type-file`` takes them.

A line is a regular expression for names and a type,
``^blk\.3\.ffn_down\.weight$=q6_k``; the first that matches decides. So llama.cpp's own
quantizer gives every matrix the type that it has in ours, whatever mix it is called
with. No type falls back to another there: the file was laid out with types that fit.

Source: llama.cpp ``tools/quantize/quantize.cpp``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from compress.core.errors import ExportError
from compress.export.gguf_layout import Placement


def type_rules(placements: Iterable[Placement]) -> list[tuple[str, str]]:
    """Return pattern and type of each matrix."""
    return [
        (f"^{re.escape(placement.target)}$", placement.type)
        for placement in placements
        if len(placement.shape) > 1
    ]


def write_tensor_types(path: Path, placements: Iterable[Placement]) -> None:
    """Write the types of all matrices.

    Raises:
        ExportError: The file cannot be written.
    """
    lines = (f"{pattern}={kind}\n" for pattern, kind in type_rules(placements))
    try:
        path.write_text("".join(lines), "utf-8")
    except OSError as error:
        raise ExportError(f"{path}: cannot write: {error.strerror}") from error
