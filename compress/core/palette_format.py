"""The checkpoint layout ``palette``: codes with tables, or on an integer grid.

A coded matrix ``P`` of ``[R, C]`` is a few tensors. Codes of a row follow one another
from the lowest bit of its first byte on; rows begin at a byte.

=============  =====================================  ================================
tensor         type                                   shape
=============  =====================================  ================================
``P.codes``    uint8                                  ``[R, ceil(C / g * M * b / 8)]``
``P.tables``   as ``dtype`` of its group              ``[T, M, 2**b, g]``
``P.scale``    as ``dtype``                           ``[R, 1]``; ``[R, C / group]``
``P.zero``     as ``dtype``; uint8 of ``b`` bits      as scales; packed as codes
=============  =====================================  ================================

Tables belong to runs of ``rows`` rows; on the grid ``product`` to runs of ``g``
columns, and ``T`` is ``C / g``. Scales with tables are there only if rows have them.
Layers on an integer grid have scales, and zero points if their scheme has; codes and
integer zero points are stored from zero up (``q + 2**(b - 1)``). So a plan that mixes
palettes with ``int8-g64`` has one home.

``config.json`` lists groups of layers that share a scheme, each with all numbers and
with the shapes of its layers, since packing hides the number of columns. A code of
``b`` bits cannot point outside a table of ``2**b`` entries: damage can change values,
never reach beyond memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compress.core import codebooks
from compress.core.artifact import TensorInfo
from compress.core.errors import CheckpointError, SchemeError
from compress.core.foreign import MALFORMED
from compress.core.packing import pack_bytes, packed_bytes, unpack_bytes
from compress.core.scheme import (
    CODEBOOK,
    INTEGER,
    SCALE_BITS,
    WHOLE,
    Codebook,
    Scales,
    Scheme,
    Zero,
)
from compress.core.tensors import TORCH_DTYPES, QuantizedTensor

PRODUCT = "product"
"""In a config: the grid of tables that belong to runs of columns."""
QUANT_METHOD = "palette"
FORMAT_VERSION = 1
SUFFIXES = ("codes", "tables", "scale", "zero")
"""What a coded layer stores; never ``weight``."""
_MOST_BITS = 16
_VALUES_AT_ONCE = 1 << 22  # decoded in one step, which bounds the memory
Layers = dict[str, tuple[Scheme, tuple[int, int]]]


def obstacle(scheme: Scheme) -> str | None:
    """Return why a scheme cannot be stored, with the remedy; ``None`` if it can."""
    if scheme.rank:
        return (
            f"the palette format has no low-rank corrections, which {scheme.name} "
            f"has; use {replace(scheme, rank=0).name}, or a safetensors export with "
            "dense: true"
        )
    if scheme.inputs is not None:
        return (
            f"the palette format cannot say that inputs are rounded, as {scheme.name} "
            f"asks; use {scheme.weights.name}, or a safetensors export"
        )
    if scheme.codebook is not None:
        return None
    if scheme.is_integer and scheme.scales is Scales.FREE:
        return None
    return (
        f"the palette format holds tables and integer grids, not {scheme.name}; use "
        f"int{min(scheme.bits, 8)}-g32 or dense for this layer, or a safetensors or "
        "gguf export"
    )


def tensors(scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorInfo]:
    """Describe the stored tensors of a layer of ``[R, C]``, by suffix."""
    rows, columns = shape
    dtype, book = scheme.scale_dtype, scheme.codebook
    width = columns if book is None else columns // book.vector * book.count
    size = packed_bytes(width, scheme.bits)
    found = {"codes": TensorInfo((rows, size), "uint8")}
    if book is not None:
        runs = scheme.table_runs(rows, columns)
        entries = (runs, book.count, 1 << scheme.bits, book.vector)
        found["tables"] = TensorInfo(entries, dtype)
        if book.scaled:
            found["scale"] = TensorInfo((rows, 1), dtype)
        return found
    groups = columns // scheme.group_of(columns)
    found["scale"] = TensorInfo((rows, groups), dtype)
    if scheme.zero is Zero.INTEGER:
        size = packed_bytes(groups, scheme.bits)
        found["zero"] = TensorInfo((rows, size), "uint8")
    elif scheme.zero is Zero.OFFSET:
        found["zero"] = TensorInfo((rows, groups), dtype)
    return found


def encode(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """Return what :func:`tensors` describes, on the device of ``tensor``."""
    scheme = tensor.scheme
    if scheme.codebook is not None:
        assert tensor.tables is not None
        places = codebooks.from_stored(tensor.codes)
        stored = {"codes": pack_bytes(places, scheme.bits), "tables": tensor.tables}
        if scheme.codebook.scaled:
            stored["scale"] = tensor.scale
        return stored
    above = tensor.codes.int() - scheme.lowest
    stored = {"codes": pack_bytes(above, scheme.bits), "scale": tensor.scale}
    if tensor.zero is not None:
        stored["zero"] = tensor.zero
        if scheme.zero is Zero.INTEGER:
            zero = tensor.zero.int() - scheme.lowest
            stored["zero"] = pack_bytes(zero, scheme.bits)
    return stored


def check(
    stored: Mapping[str, TensorInfo], scheme: Scheme, shape: tuple[int, int]
) -> None:
    """Raise unless the stored tensors of a layer are those of its scheme.

    Raises:
        CheckpointError: Names the tensor; the caller adds file and layer.
    """
    expected = tensors(scheme, shape)
    for suffix, info in expected.items():
        if suffix not in stored:
            raise CheckpointError(f"{suffix} is missing")
        if stored[suffix] != info:
            raise CheckpointError(
                f"{suffix} is {stored[suffix].dtype} {list(stored[suffix].shape)}; its "
                f"config makes it {info.dtype} {list(info.shape)}"
            )
    for suffix in stored:
        if suffix not in expected:
            raise CheckpointError(f"{suffix} does not belong to {scheme.name}")


def decode(
    stored: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]
) -> QuantizedTensor:
    """Return the codes of a layer, exactly as they were encoded.

    Raises:
        CheckpointError: A table, scale or minimum is not finite.
    """
    for suffix, tensor in stored.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{suffix} has NaN or infinite values")
    return _decoded(stored, scheme, shape[1])


def decode_values(
    stored: Mapping[str, Tensor],
    scheme: Scheme,
    shape: tuple[int, int],
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weights ``[R, C]``, decoded in float32 and rounded once to ``dtype``.

    Rows are decoded a few at a time: the memory is that of the result and 16 MiB.
    """
    rows, columns = shape
    values = torch.empty(shape, dtype=dtype, device=stored["codes"].device)
    for run in _runs(scheme, shape):
        values[run] = _decoded(
            _rows_of(stored, scheme, run), scheme, columns
        ).dequantize(dtype)
    return values


def decode_rows(
    stored: Mapping[str, Tensor],
    scheme: Scheme,
    shape: tuple[int, int],
    rows: Tensor,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Return some rows ``[n, C]`` of the weights, as :func:`decode_values` has them.

    Args:
        stored: Tensors of the layer.
        scheme: Of the layer.
        shape: Of the whole matrix.
        rows: int64 ``[n]`` on the device of the tensors.
        dtype: To round to.
    """
    columns = shape[1]
    values = torch.empty(len(rows), columns, dtype=dtype, device=rows.device)
    own = scheme
    block = scheme.rows_of_scale(shape[0])
    if scheme.codebook is not None and scheme.row_block != WHOLE:
        own = replace(scheme, row_block=1)
    weight_of_row = columns + (0 if own is scheme else stored["tables"][0].numel())
    step = max(1, _VALUES_AT_ONCE // weight_of_row)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        picked = {s: t[part] for s, t in stored.items() if s != "tables"}
        if "tables" in stored:
            tables = stored["tables"]
            picked["tables"] = tables if own is scheme else tables[part // block]
        decoded = _decoded(picked, own, columns)
        values[start : start + step] = decoded.dequantize(dtype)
    return values


def _runs(scheme: Scheme, shape: tuple[int, int]) -> Iterator[slice]:
    """Yield runs of rows that share no tables with another run, but for ``WHOLE``."""
    rows, columns = shape
    block = 1 if scheme.row_block == WHOLE else scheme.row_block
    step = max(1, _VALUES_AT_ONCE // (columns * block)) * block
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _rows_of(
    stored: Mapping[str, Tensor], scheme: Scheme, run: slice
) -> dict[str, Tensor]:
    part = {s: t[run] for s, t in stored.items() if s != "tables"}
    if "tables" in stored:
        tables = stored["tables"]
        if scheme.row_block != WHOLE:
            block = scheme.row_block
            tables = tables[run.start // block : -(-run.stop // block)]
        part["tables"] = tables
    return part


def _decoded(
    stored: Mapping[str, Tensor], scheme: Scheme, columns: int
) -> QuantizedTensor:
    book, codes = scheme.codebook, stored["codes"]
    width = columns if book is None else columns // book.vector * book.count
    places = unpack_bytes(codes, scheme.bits, width)
    if book is not None:
        scale = stored.get("scale")
        if scale is None:
            dtype = TORCH_DTYPES[scheme.scale_dtype]
            scale = torch.ones(1, 1, dtype=dtype, device=codes.device)
        places = codebooks.to_stored(places, scheme.bits)
        return QuantizedTensor(places, scale, None, scheme, tables=stored["tables"])
    zero = stored.get("zero")
    if scheme.zero is Zero.INTEGER:
        assert zero is not None
        packed = unpack_bytes(zero, scheme.bits, columns // scheme.group_of(columns))
        zero = (packed.int() + scheme.lowest).to(torch.int8)
    # Codes of an offset grid begin at zero and have at most 7 bits.
    signed = (places.int() + scheme.lowest).to(torch.int8)
    return QuantizedTensor(signed, stored["scale"], zero, scheme)


def config_of(layers: Layers) -> dict[str, Any]:
    """Return the ``quantization_config`` that :func:`layers_of` reads.

    Args:
        layers: Scheme and shape of each coded layer, by module name.
    """
    groups: dict[Scheme, dict[str, list[int]]] = {}
    for name, (scheme, shape) in layers.items():
        groups.setdefault(scheme, {})[name] = list(shape)
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "groups": [{**_entry(s), "layers": names} for s, names in groups.items()],
    }


def layers_of(config: Mapping[str, Any]) -> Layers:
    """Return scheme and shape of each coded layer.

    Args:
        config: A ``quantization_config``.

    Raises:
        CheckpointError: Another version, or an entry that makes no sense.
    """
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"palette format_version {version!r}; this release reads {FORMAT_VERSION}"
        )
    groups = config.get("groups")
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        raise CheckpointError("quantization_config.groups is not a list")
    found: Layers = {}
    for number, group in enumerate(groups):
        where = f"quantization_config.groups[{number}]"
        try:
            scheme = _scheme(group)
            for name, shape in group["layers"].items():
                if name in found:
                    raise CheckpointError(f"{name} is in two groups")
                rows, columns = (_count(size, "shape") for size in shape)
                scheme.check_columns(columns, name)
                found[name] = scheme, (rows, columns)
        except (SchemeError, CheckpointError) as error:
            raise CheckpointError(f"{where}: {error}") from error
        except MALFORMED as error:
            raise CheckpointError(
                f"{where}: {type(error).__name__}: {error}"
            ) from error
    return found


def _entry(scheme: Scheme) -> dict[str, Any]:
    entry: dict[str, Any] = {"bits": scheme.bits, "dtype": scheme.scale_dtype}
    if scheme.codebook is None:
        return {
            "grid": INTEGER,
            **entry,
            "group_size": scheme.group_size,
            "zero": scheme.zero.value,
        }
    book = {
        **entry,
        "tables": scheme.codebook.count,
        "vector": scheme.codebook.vector,
        "row_scales": scheme.codebook.scaled,
    }
    if scheme.codebook.positional:
        return {"grid": PRODUCT, **book}
    rows = None if scheme.row_block == WHOLE else scheme.row_block
    return {"grid": CODEBOOK, **book, "rows": rows}


def _scheme(group: Mapping[str, Any]) -> Scheme:
    bits, dtype = _count(group["bits"], "bits"), group["dtype"]
    if dtype not in SCALE_BITS:
        raise CheckpointError(f"dtype {dtype!r}; known are {list(SCALE_BITS)}")
    if group["grid"] == INTEGER:
        size, zero = group["group_size"], Zero(group["zero"])
        if not 2 <= bits <= 8 - (zero is Zero.OFFSET):
            raise CheckpointError(f"an integer grid of {bits} bits")
        columns = None if size is None else _count(size, "group_size")
        return Scheme(bits, columns, zero, scale_dtype=dtype)
    if group["grid"] not in (CODEBOOK, PRODUCT):
        known = "int, codebook and product"
        raise CheckpointError(f"grid {group['grid']!r}; known are {known}")
    if bits > _MOST_BITS:
        raise CheckpointError(f"codes of {bits} bits; at most {_MOST_BITS}")
    if not isinstance(group["row_scales"], bool):
        raise CheckpointError(f"row_scales {group['row_scales']!r}")
    count, vector = (_count(group[key], key) for key in ("tables", "vector"))
    positional = group["grid"] == PRODUCT
    book = Codebook(count, vector, group["row_scales"], positional)
    rows = None if positional else group["rows"]
    block = WHOLE if rows is None else _count(rows, "rows")
    return Scheme(
        bits, None, scale_dtype=dtype, grid=CODEBOOK, row_block=block, codebook=book
    )


def _count(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{what} {value!r} is no positive number")
    return value
