"""The checkpoint layout ``aqlm``, which stock transformers loads with ``aqlm``.

A coded linear ``P`` of ``[R, C]`` with ``M`` tables of ``2**B`` vectors of ``g`` is

* ``P.codes``: ``[R, C / g, M]``, int8 up to 8 bits and int16 up to 16, each code in
  two's complement (``k - 2**B`` from ``2**(B - 1)`` on);
* ``P.codebooks``: float16 ``[M, 2**B, 1, g]``;
* ``P.scales``: float16 ``[R, 1, 1, 1]``.

One ``(M, B, g)`` serves the whole model. Codes are not packed, so only 8 and 16 bits
take the space that their name says; others are read, and not written.

Kernels sum products of inputs and table entries before the row's scale, some of them in
float16. So a power of two moves from the tables to the scales until the largest entry
lies in ``(0.5, 1]``; where that would round an entry or a scale nothing is moved, and
values are the same in either case.

Source: transformers 5.23 ``integrations/aqlm.py``, aqlm 1.1.7; Egiazarian et al.
(2024), arXiv 2401.06118.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress.core import codebooks
from compress.core.artifact import TensorInfo
from compress.core.errors import CheckpointError
from compress.core.scheme import CODEBOOK, WHOLE, Codebook, Scheme
from compress.core.tensors import QuantizedTensor

QUANT_METHOD = "aqlm"
SUFFIXES = ("codes", "codebooks", "scales")
"""What a coded layer stores; never ``weight``."""
WRITTEN_BITS = (8, 16)
DTYPE = "float16"
_FLOATS = ("float16", "bfloat16", "float32")


def is_additive(scheme: Scheme) -> bool:
    """Whether a scheme is one set of tables for a matrix, under a scale a row."""
    return (
        scheme.codebook is not None
        and scheme.codebook.scaled
        and not scheme.codebook.positional
        and scheme.row_block == WHOLE
        and not scheme.rank
        and scheme.inputs is None
    )


def tensors(scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorInfo]:
    """Describe the stored tensors of a layer of ``[R, C]``, by suffix."""
    book = scheme.codebook
    assert book is not None
    rows, columns = shape
    codes = (rows, columns // book.vector, book.count)
    entries = (book.count, 1 << scheme.bits, 1, book.vector)
    return {
        "codes": TensorInfo(codes, "int8" if scheme.bits <= 8 else "int16"),
        "codebooks": TensorInfo(entries, scheme.scale_dtype),
        "scales": TensorInfo((rows, 1, 1, 1), scheme.scale_dtype),
    }


def encode(tensor: QuantizedTensor) -> tuple[dict[str, Tensor], int]:
    """Return what :func:`tensors` describes, and the power of two that was moved.

    Args:
        tensor: 8 or 16 bits, tables and scales in float16.

    Returns:
        Tensors, and ``e``: stored tables are ``2**-e`` times, stored scales ``2**e``
        times those of ``tensor``.
    """
    scheme, book = tensor.scheme, tensor.scheme.codebook
    assert book is not None and tensor.tables is not None
    assert scheme.bits in WRITTEN_BITS
    rows, columns = tensor.shape
    whole = torch.int8 if scheme.bits <= 8 else torch.int16
    codes = tensor.codes.contiguous().view(whole)
    tables, scale, exponent = _folded(tensor.tables, tensor.scale)
    stored = {
        "codes": codes.view(rows, columns // book.vector, book.count),
        "codebooks": tables[0].unsqueeze(2),
        "scales": scale.view(rows, 1, 1, 1),
    }
    return stored, exponent


def decode(
    stored: Mapping[str, Tensor], scheme: Scheme, *, exponent: int = 0
) -> QuantizedTensor:
    """Return the codes of a layer.

    Args:
        stored: Its tensors, of the shapes of :func:`tensors`.
        scheme: Of the layer.
        exponent: What :func:`encode` moved; tables and scales are moved back.

    Raises:
        CheckpointError: A code, table entry or scale is out of range.
    """
    for suffix in ("codebooks", "scales"):
        if not bool(stored[suffix].isfinite().all()):
            raise CheckpointError(f"{suffix} has NaN or infinite values")
    codes, half = stored["codes"], 1 << (scheme.bits - 1)
    low, high = int(codes.min()), int(codes.max())
    if low < -half or high >= half:
        raise CheckpointError(
            f"codes has values from {low} to {high}; {scheme.bits} bits hold {-half} "
            f"to {half - 1}"
        )
    rows = len(codes)
    places = codes.int() & ((1 << scheme.bits) - 1)
    tables = stored["codebooks"].squeeze(2).unsqueeze(0)
    scale = stored["scales"].view(rows, 1)
    return QuantizedTensor(
        codebooks.to_stored(places.view(rows, -1), scheme.bits),
        scale * 2.0**-exponent,
        None,
        scheme,
        tables=tables * 2.0**exponent,
    )


def check(
    stored: Mapping[str, TensorInfo], scheme: Scheme, shape: tuple[int, int]
) -> None:
    """Raise unless the stored tensors of a layer are those of its scheme.

    Raises:
        CheckpointError: Names the tensor; the caller adds file and layer.
    """
    for suffix, info in tensors(scheme, shape).items():
        if suffix not in stored:
            raise CheckpointError(f"{suffix} is missing")
        found = stored[suffix]
        known = found.dtype in _FLOATS if suffix == "scales" else found == info
        if found.shape != info.shape or not known:
            raise CheckpointError(
                f"{suffix} is {found.dtype} {list(found.shape)}; its config makes it "
                f"{info.dtype} {list(info.shape)}"
            )


def config_of(scheme: Scheme, dense: list[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a checkpoint.

    Args:
        scheme: Of all coded layers.
        dense: Module names of all linear layers without codes. They are listed with
            and without ``.weight``: transformers 4 compares names of parameters, 5
            names of modules.
    """
    book = scheme.codebook
    assert book is not None
    skipped = [name + suffix for name in dense for suffix in ("", ".weight")]
    return {
        "quant_method": QUANT_METHOD,
        "in_group_size": book.vector,
        "out_group_size": 1,
        "num_codebooks": book.count,
        "nbits_per_codebook": scheme.bits,
        "linear_weights_not_to_quantize": skipped,
    }


def scheme_of(config: Mapping[str, Any], dtype: str) -> Scheme:
    """Return the scheme of all coded layers of a checkpoint.

    Args:
        config: A ``quantization_config``.
        dtype: Of the stored tables.

    Raises:
        CheckpointError: The config makes no sense, or has groups of several rows.
    """
    numbers = {}
    keys = ("num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size")
    for key, default in zip(keys, (1, 16, 8, 1), strict=True):
        value = config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"quantization_config.{key}: {value!r}")
        numbers[key] = value
    if numbers["out_group_size"] != 1:
        raise CheckpointError(
            f"out_group_size {numbers['out_group_size']}: vectors that span rows are "
            "not read"
        )
    if numbers["nbits_per_codebook"] > 16:
        raise CheckpointError(f"codes of {numbers['nbits_per_codebook']} bits")
    if dtype not in _FLOATS:
        raise CheckpointError(f"codebooks of type {dtype}")
    book = Codebook(numbers["num_codebooks"], numbers["in_group_size"], scaled=True)
    return Scheme(
        numbers["nbits_per_codebook"],
        None,
        scale_dtype=dtype,
        grid=CODEBOOK,
        row_block=WHOLE,
        codebook=book,
    )


def _folded(tables: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, int]:
    """Move a power of two from tables to scales, if that is exact."""
    largest = float(tables.abs().max())
    if not (math.isfinite(largest) and largest):
        return tables, scale, 0
    mantissa, exponent = math.frexp(largest)
    exponent -= mantissa == 0.5  # 1 itself may stay
    small, large = tables * 2.0**-exponent, scale * 2.0**exponent
    if torch.equal(small * 2.0**exponent, tables) and torch.equal(
        large * 2.0**-exponent, scale
    ):
        return small, large, exponent
    return tables, scale, 0
