"""Names of schemes, in both directions.

A name is ``WEIGHTS[+INPUTS][-lorcR]``. Weights are

* ``int<bits>[-g<columns>][-asym|-offset]``: ``int4-g64`` is symmetric with a scale for
  each 64 columns, ``int8`` has one scale a row, ``-asym`` adds an integer zero point,
  ``-offset`` a float minimum. The simple GGUF types name the same schemes (``q4_0`` is
  ``int4-g32``), so that one plan can be written to both kinds of file;
* ``fp4``, ``fp6``, ``fp8`` or a grid such as ``e3m0``, with ``-g<columns>``,
  ``-tensor`` (one scale) or ``-b<size>`` (square blocks), and ``-pow2`` or ``-ratio``
  for scales that are powers of two, alone or within a row;
* ``nvfp4``, ``mxfp4``, ``mxfp6``, ``mxfp8``;
* ggml's ``q2_k`` to ``q6_k``, ``iq4_nl`` and ``iq4_xs``;
* ``palette<bits>`` with a table of free values for each 16 rows, ``-r<rows>`` for each
  so many or ``-tensor`` for all, ``palette-<columns>x<bits>`` with vectors in place of
  values (one table for all rows unless it says ``-r``), ``-scaled`` for a scale a row;
* ``aqlm-<tables>x<bits>g<columns>``, sums of vectors under a scale a row;
* ``pq-<columns>x<bits>`` with a table of vectors for each run of columns, shared by all
  rows, ``pq-<columns>x<bits>x<tables>`` with sums of several, ``-scaled`` as above.

Inputs are a grid with an optional group, ``int8`` or ``e4m3-g128``; the usual pairs
have names of their own: ``w8a8``, ``w6a8-g128``, ``w6a8-g128-group``, ``fp8-w8a8``,
``fp8-block``, ``nvfp4-w4a4``, ``w4a8-fp-g128``, ``w4afp8-g128``. ``-lorc8`` adds a
low-rank correction of rank 8.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace

from compress.core.errors import SchemeError
from compress.core.scheme import (
    CODEBOOK,
    FLOAT_FORMATS,
    INTEGER,
    IQ4,
    SUPER_COLUMNS,
    WHOLE,
    Codebook,
    InputScheme,
    Scales,
    Scheme,
    Zero,
)

GGUF_SCHEMES: dict[str, tuple[int, Zero]] = {
    "q4_0": (4, Zero.NONE),
    "q5_0": (5, Zero.NONE),
    "q8_0": (8, Zero.NONE),
    "q4_1": (4, Zero.OFFSET),
    "q5_1": (5, Zero.OFFSET),
}
K_SCHEMES = {
    "q2_k": Scheme(2, 16, Zero.OFFSET, scales=Scales.SUPER),
    "q3_k": Scheme(3, 16, scales=Scales.SUPER),
    "q4_k": Scheme(4, 32, Zero.OFFSET, scales=Scales.SUPER),
    "q5_k": Scheme(5, 32, Zero.OFFSET, scales=Scales.SUPER),
    "q6_k": Scheme(6, 16, scales=Scales.SUPER),
    "iq4_nl": Scheme(4, 32, grid=IQ4),
    "iq4_xs": Scheme(4, 32, grid=IQ4, scales=Scales.SUPER),
}
FLOAT_SCHEMES = {
    "mxfp4": Scheme(4, 32, grid="e2m1", scales=Scales.POWER),
    "nvfp4": Scheme(4, 16, grid="e2m1", scales=Scales.TWO_LEVEL),
}
"""Schemes of four-bit floats that GGUF has types for."""
_FOR_OTHER_COLUMNS = {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "iq4_xs": "iq4_nl",
}
_FLOAT_NAMES = {"fp4": "e2m1", "fp6": "e2m3", "fp8": "e4m3"}
_MICROSCALING = {"mxfp4": "e2m1", "mxfp6": "e2m3", "mxfp8": "e4m3"}
_NVFP4_INPUTS = "nvfp4"
_TABLE_ROWS = 16  # of a palette whose name does not say it

_RANK = re.compile(r"(.+)-lorc([1-9]\d*)")
_INTEGER = re.compile(r"int([2-8])(?:-g([1-9]\d*))?(?:-(asym|offset))?")
_FLOAT = re.compile(
    rf"({'|'.join([*_FLOAT_NAMES, *FLOAT_FORMATS])})"
    r"(?:-g([1-9]\d*)|-(tensor)|-b([1-9]\d*))?(?:-(pow2|ratio))?"
)
_PALETTE = re.compile(
    r"palette(?:([1-8])|-([1-9]\d?)x([1-9]\d?))(?:-r([1-9]\d*)|-(tensor))?(-scaled)?"
)
_AQLM = re.compile(r"aqlm-([1-9]\d?)x([1-9]\d?)g([1-9]\d?)")
_PRODUCT = re.compile(r"pq-([1-9]\d*)x([1-9]\d?)(?:x([2-9]))?(-scaled)?")
_MOST_CODE_BITS = 16
_INPUTS = re.compile(rf"(int[468]|{'|'.join(FLOAT_FORMATS)})(?:-g([1-9]\d*))?")

# Pairs with a name of their own: pattern and how it is spelled in full, both ways.
_FULL = (
    (r"w([2-8])a([468])((?:-g\d+)?(?:-asym)?)", r"int\1\3+int\2"),
    (r"w([2-8])a([468])-g(\d+)(-asym)?-group", r"int\1-g\3\4+int\2-g\3"),
    (r"w4afp8((?:-g\d+)?(?:-asym)?)", r"int4\1+e4m3"),
    (r"w4a8-fp((?:-g\d+)?(?:-pow2|-ratio)?)", r"fp4\1+e4m3"),
    (r"fp8-w8a8", r"fp8+e4m3"),
    (r"fp8-block", r"fp8-b128+e4m3-g128"),
    (r"nvfp4-w4a4", r"nvfp4+nvfp4"),
)
_SHORT = (
    (r"int([2-8])((?:-g\d+)?(?:-asym)?)\+int([468])", r"w\1a\3\2"),
    (r"int([2-8])-g(\d+)(-asym)?\+int([468])-g\2", r"w\1a\4-g\2\3-group"),
    (r"int4((?:-g\d+)?(?:-asym)?)\+e4m3", r"w4afp8\1"),
    (r"fp4((?:-g\d+)?(?:-pow2|-ratio)?)\+e4m3", r"w4a8-fp\1"),
    (r"fp8\+e4m3", r"fp8-w8a8"),
    (r"fp8-b128\+e4m3-g128", r"fp8-block"),
    (r"nvfp4\+nvfp4", r"nvfp4-w4a4"),
)
_EXAMPLES = (
    *(f"int{b}-g{g}" for b in range(2, 9) for g in (32, 64, 128)),
    *(f"w{b}a8-g{g}" for b in (4, 6) for g in (64, 128)),
    *("w8a8", "fp8", "fp8-w8a8", "fp8-block", "fp4-g32", "fp4-g128-ratio"),
    *("nvfp4", "nvfp4-w4a4", "w4a8-fp-g128", "w4afp8-g128", "fp6-g32"),
    *_MICROSCALING,
    *GGUF_SCHEMES,
    *K_SCHEMES,
    *(f"palette{b}" for b in range(2, 9)),
    *("palette-2x6", "palette-4x8", "aqlm-1x8g4", "aqlm-1x8g8", "aqlm-2x8g8"),
    *("pq-2x8", "pq-4x8", "pq-8x8", "pq-8x8x2"),
)


def parse(name: str) -> Scheme:
    """Return the scheme that ``name`` stands for.

    Raises:
        SchemeError: The name is unknown; the message lists the nearest.
    """
    key, rank = name.strip().lower(), 0
    if match := _RANK.fullmatch(key):
        key, rank = match[1], int(match[2])
    weights, plus, inputs = _rewritten(key, _FULL).partition("+")
    scheme = _weights(weights, name)
    read = _inputs(inputs) if plus else None
    if scheme is None or (plus and read is None):
        raise _unknown(name)
    return replace(scheme, inputs=read, rank=rank)


def name_of(scheme: Scheme) -> str:
    """Return the canonical name of a scheme."""
    name = _weights_name(scheme)
    if scheme.inputs is not None:
        name = _rewritten(f"{name}+{_inputs_name(scheme.inputs)}", _SHORT)
    return f"{name}-lorc{scheme.rank}" if scheme.rank else name


def _rewritten(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, other in table:
        if match := re.fullmatch(pattern, name):
            return match.expand(other)
    return name


def for_columns(scheme: Scheme, columns: int) -> Scheme:
    """Return ``scheme``, or what llama.cpp takes for rows that it cannot hold.

    ggml's K types hold rows in runs of 256 columns; for a row of another length
    llama-quantize takes a simple type with as many bits or more.
    """
    if scheme.scales is not Scales.SUPER or columns % SUPER_COLUMNS == 0:
        return scheme
    return parse(_FOR_OTHER_COLUMNS[name_of(scheme)])


def _weights(key: str, name: str) -> Scheme | None:
    if key in GGUF_SCHEMES:
        bits, zero = GGUF_SCHEMES[key]
        return Scheme(bits, 32, zero)
    if key in K_SCHEMES:
        return K_SCHEMES[key]
    if key in FLOAT_SCHEMES:
        return FLOAT_SCHEMES[key]
    if key in _MICROSCALING:
        grid = _MICROSCALING[key]
        return Scheme(FLOAT_FORMATS[grid].bits, 32, grid=grid, scales=Scales.POWER)
    if match := _INTEGER.fullmatch(key):
        group = int(match[2]) if match[2] else None
        scheme = Scheme(int(match[1]), group, Zero(match[3] or "none"))
        if scheme.zero is Zero.OFFSET and scheme.bits == 8:
            raise SchemeError(f"scheme {name!r}: an offset grid has at most 7 bits")
        return scheme
    if key.startswith(("palette", "aqlm", "pq")):
        return _tables(key, name)
    if match := _FLOAT.fullmatch(key):
        grid = _FLOAT_NAMES.get(match[1], match[1])
        block = match[4]
        if match[5] == "ratio" and (match[3] or block):
            raise SchemeError(
                f"scheme {name!r}: ratios are taken within a row, so rows cannot share "
                "scales; use -g<columns>-ratio"
            )
        columns = match[2] or block
        return Scheme(
            FLOAT_FORMATS[grid].bits,
            int(columns) if columns else None,
            grid=grid,
            scales=Scales(match[5] or "free"),
            row_block=WHOLE if match[3] else int(block or 1),
        )
    return None


def _tables(key: str, name: str) -> Scheme | None:
    """Return a scheme of tables; ``None`` if the name is none."""
    if match := _AQLM.fullmatch(key):
        count, bits, vector = map(int, match.groups())
        codebook, rows = Codebook(count, vector, scaled=True), WHOLE
    elif match := _PALETTE.fullmatch(key):
        bits, vector = int(match[1] or match[3]), int(match[2] or 1)
        rows = int(match[4] or (_TABLE_ROWS if vector == 1 else 0)) or WHOLE
        codebook = Codebook(1, vector, scaled=match[6] is not None)
        rows = WHOLE if match[5] else rows
    elif match := _PRODUCT.fullmatch(key):
        vector, bits, count = int(match[1]), int(match[2]), int(match[3] or 1)
        scaled = match[4] is not None
        codebook, rows = Codebook(count, vector, scaled, positional=True), WHOLE
    else:
        return None
    if bits > _MOST_CODE_BITS:
        raise SchemeError(
            f"scheme {name!r}: codes have at most {_MOST_CODE_BITS} bits, not {bits}"
        )
    return Scheme(bits, None, grid=CODEBOOK, row_block=rows, codebook=codebook)


def _tables_name(scheme: Scheme, codebook: Codebook) -> str:
    count, vector, scaled = codebook.count, codebook.vector, codebook.scaled
    if codebook.positional:
        tables = f"x{count}" if count > 1 else ""
        return f"pq-{vector}x{scheme.bits}{tables}{'-scaled' if scaled else ''}"
    wide = count > 1 or vector > 1 or scheme.bits > 8
    if scaled and scheme.row_block == WHOLE and wide:
        return f"aqlm-{count}x{scheme.bits}g{vector}"
    name = f"palette{scheme.bits}" if vector == 1 else f"palette-{vector}x{scheme.bits}"
    if scheme.row_block == WHOLE:
        name += "-tensor" if vector == 1 else ""
    elif (vector, scheme.row_block) != (1, _TABLE_ROWS):
        name += f"-r{scheme.row_block}"
    return f"{name}-scaled" if scaled else name


def _inputs(key: str) -> InputScheme | None:
    if key == _NVFP4_INPUTS:
        return InputScheme("e2m1", 16, two_level=True)
    match = _INPUTS.fullmatch(key)
    return InputScheme(match[1], int(match[2]) if match[2] else None) if match else None


def _weights_name(scheme: Scheme) -> str:
    if scheme.codebook is not None:
        return _tables_name(scheme, scheme.codebook)
    group = f"-g{scheme.group_size}" if scheme.group_size else ""
    if scheme.scales is Scales.SUPER or scheme.grid == IQ4:
        alike = replace(scheme, scale_dtype="float16", rank=0, inputs=None)
        return next(name for name, known in K_SCHEMES.items() if known == alike)
    if scheme.grid == INTEGER:
        zero = "" if scheme.zero is Zero.NONE else f"-{scheme.zero.value}"
        return f"int{scheme.bits}{group}{zero}"
    if scheme.scales is Scales.TWO_LEVEL:
        return "nvfp4"
    if scheme.scales is Scales.POWER and (scheme.group_size, scheme.row_block) == (
        32,
        1,
    ):
        for name, grid in _MICROSCALING.items():
            if grid == scheme.grid:
                return name
    short = {grid: name for name, grid in _FLOAT_NAMES.items()}
    if scheme.row_block == WHOLE:
        group = "-tensor"
    elif scheme.row_block != 1:
        group = f"-b{scheme.row_block}"
    scales = "" if scheme.scales is Scales.FREE else f"-{scheme.scales.value}"
    return f"{short.get(scheme.grid, scheme.grid)}{group}{scales}"


def _inputs_name(inputs: InputScheme) -> str:
    if inputs.two_level:
        return _NVFP4_INPUTS
    group = f"-g{inputs.group_size}" if inputs.group_size else ""
    return f"{inputs.grid}{group}"


def _unknown(name: str) -> SchemeError:
    near = difflib.get_close_matches(name.lower(), _EXAMPLES, n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return SchemeError(
        f"unknown scheme {name!r}{hint} Schemes are int2..int8 with an optional -gN "
        "and -asym or -offset, fp4, fp6, fp8 with -gN and -pow2 or -ratio, nvfp4, "
        "mxfp4, w8a8, w6a8-gN, fp8-w8a8, fp8-block, w4a8-fp-gN, palette2..palette8, "
        "aqlm-MxBgG, pq-CxB and "
        f"{', '.join([*GGUF_SCHEMES, *K_SCHEMES])}; 'dense' keeps a layer as it is"
    )
