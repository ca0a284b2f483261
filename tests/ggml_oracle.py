"""ggml's own encoder, from the library inside llama-cpp-python."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor


@cache
def _library() -> ctypes.CDLL:
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("llama-cpp-python is not installed")
    library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml-base.so"))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    floats = ctypes.POINTER(ctypes.c_float)
    size = ctypes.c_int64
    quantize.argtypes = [
        *(ctypes.c_int, floats, ctypes.c_void_p, size, size, size, floats)
    ]
    return library


def encoded(weight: Tensor, kind: str, importance: Tensor | None = None) -> np.ndarray:
    """Return the bytes ``[R, row_bytes]`` that ggml makes of ``weight``."""
    number = gguf.GGMLQuantizationType[kind.upper()]
    rows, columns = weight.shape
    block, size = gguf.GGML_QUANT_SIZES[number]
    data = np.zeros((rows, columns // block * size), np.uint8)
    values = np.ascontiguousarray(weight.float().numpy())
    pointer = ctypes.POINTER(ctypes.c_float)
    weights = None
    if importance is not None:
        array = np.ascontiguousarray(importance.float().numpy())
        weights = array.ctypes.data_as(pointer)
    library = _library()
    library.ggml_quantize_init(int(number))
    written = library.ggml_quantize_chunk(
        *(int(number), values.ctypes.data_as(pointer), data.ctypes.data),
        *(0, rows, columns, weights),
    )
    assert written == data.nbytes
    return data


def decoded(data: np.ndarray, kind: str) -> Tensor:
    """Return the float32 values of :func:`encoded` by the gguf package."""
    number = gguf.GGMLQuantizationType[kind.upper()]
    return torch.from_numpy(gguf.quants.dequantize(data, number))
