"""Files of a GGUF export: the model, and beside it what llama-quantize can use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from compress.core.artifact import CompressedModel, ModelDescription
from compress.core.errors import ExportError
from compress.core.plan import Plan
from compress.export.gguf_layout import Placement, main_scheme
from compress.export.imatrix import matrix_of, write_imatrix
from compress.export.tensor_types import write_tensor_types

_IMATRIX = ".imatrix.gguf"
_TENSOR_TYPES = ".tensor-types.txt"


def only_file(folder: Path) -> Path:
    """Return the model's file of an export.

    Raises:
        ExportError: There is none, or more than one.
    """
    files = [
        path
        for path in sorted(folder.glob("*.gguf"))
        if not path.name.endswith(_IMATRIX)
    ]
    if len(files) != 1:
        raise ExportError(f"{folder} should hold one .gguf file, found {len(files)}")
    return files[0]


def file_stem(
    plan: Plan, model: ModelDescription, placements: Iterable[Placement]
) -> str:
    """Return the model's name and the scheme, or ``mixed-4.5bpw``, for a file's name.

    Bits are those of all tensors for each weight of the model. A file is mixed if
    layers of its blocks were given different schemes; one that stands in for the scheme
    that was asked for does not count.
    """
    ends = (model.family.embedding, model.family.head)
    asked = {
        layer.asked or layer.scheme.name
        for name, layer in plan.layers.items()
        if name not in ends
    }
    last = re.split(r"[/\\:]", model.label.rstrip("/\\"))[-1].removesuffix(".gguf")
    # A quantized source's own type would contradict the new scheme in the name.
    last = re.sub(r"[.-](?:I?Q\d\w*|B?F16|F32)$", "", last, flags=re.IGNORECASE)
    safe = re.sub(r"[^\w.-]+", "-", last).strip("-.") or "model"
    if len(asked) < 2:
        return f"{safe}-{main_scheme(plan)}"
    weights = sum(info.elements for info in model.tensors.values())
    bits = 8 * sum(placement.size_bytes for placement in placements) / weights
    short = f"{bits:.2f}".rstrip("0").rstrip(".")
    return f"{safe}-mixed-{short}bpw"


def write_beside(
    path: Path,
    artifact: CompressedModel,
    placements: Sequence[Placement],
    *,
    imatrix: bool,
    tensor_types: bool,
) -> tuple[list[Path], list[str]]:
    """Write what is asked for beside a file; return paths, and notes for the report.

    Args:
        path: The model's file.
        artifact: With ``input_squares``, if there is to be an importance matrix.
        placements: Of the file.
        imatrix: Whether to write an importance matrix.
        tensor_types: Whether to write the types of all matrices.

    Raises:
        ExportError: A file cannot be written.
        CalibrationError: Inputs of the model are not finite.
    """
    paths, notes = [], []
    if tensor_types:
        paths.append(path.with_name(f"{path.stem}{_TENSOR_TYPES}"))
        write_tensor_types(paths[-1], placements)
    if imatrix:
        assert artifact.input_squares is not None, "a run measures them"
        matrix = matrix_of(placements, artifact.input_squares())
        paths.append(path.with_name(f"{path.stem}{_IMATRIX}"))
        write_imatrix(paths[-1], matrix)
        notes.append(
            f"{paths[-1].name}: {matrix.chunks} x {matrix.chunk_tokens} tokens of "
            f"{', '.join(matrix.datasets)} through the dense model"
        )
    return paths, notes
