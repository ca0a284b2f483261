"""llama.cpp's own quantizer of whole files, from the library in llama-cpp-python."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest

FILE_TYPES = {"q8_0": 7, "q4_k_m": 15}  # llama_ftype


def llama_quantize(
    source: Path,
    target: Path,
    kind: str,
    *,
    importances: Mapping[str, np.ndarray] | None = None,
    types: Sequence[tuple[str, str]] = (),
) -> None:
    """Quantize a file as ``llama-quantize`` does.

    Args:
        source: Dense file.
        target: To be written.
        kind: Of :data:`FILE_TYPES`.
        importances: Mean squares by tensor, as ``--imatrix`` hands them on.
        types: Pattern and type, as ``--tensor-type-file`` hands them on.
    """
    library = pytest.importorskip("llama_cpp").llama_cpp
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    params = library.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[kind], 1
    if importances is not None:
        params.imatrix = (library.llama_model_imatrix_data * (len(importances) + 1))()
        for index, (name, values) in enumerate(importances.items()):
            entry = params.imatrix[index]
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if types:
        size = len(types) + 1
        params.tt_overrides = (library.llama_model_tensor_override * size)()
        for index, (pattern, name) in enumerate(types):
            override = params.tt_overrides[index]
            override.pattern = pattern.encode()
            override.type = int(gguf.GGMLQuantizationType[name.upper()])
    status = library.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    assert status == 0
