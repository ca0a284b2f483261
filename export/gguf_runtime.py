"""Runs GGUF files in llama.cpp, to check them with the program that will use them.

Settings take away what is llama.cpp's choice rather than the file's: float32 instead of
float16 keys and values, no flash attention, one batch a window, no token added.

One choice cannot be set: on a CPU llama.cpp rounds activations to 8 bits (groups of 32)
before every product with a quantized matrix. On SmolLM2-135M with Q4_0 layers that
alone moves the output by a mean KL of 4e-3 (four WikiText-2 windows of 512; the same
rounding put into PyTorch moves it by 4e-3 as well), which hides any defect of the file
below that. So there are two runs: :func:`llamacpp_logits`, as users run the file, and
:func:`decoded_logits`, where llama.cpp first decodes the file to float32 with its own
reader. The second says whether the file holds the model (4e-11 in the same setting).
"""

from __future__ import annotations

import ctypes
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.core.errors import ExportError, MissingDependencyError

_F32 = 0  # ggml_type
_FILE_TYPE_F32 = 0  # llama_ftype
_NO_FLASH_ATTENTION = 0  # llama_flash_attn_type


def llamacpp_logits(path: Path, windows: Tensor) -> Iterator[Tensor]:
    """Run windows of tokens through a GGUF file in llama.cpp on the CPU.

    Args:
        path: The file.
        windows: int64 ``[N, T]`` token ids, taken as they are; each row is a sequence
            of its own.

    Yields:
        float32 logits ``[T, V]`` for each window; position ``t`` has seen ``0..t``.

    Raises:
        MissingDependencyError: llama-cpp-python is not installed.
        ExportError: llama.cpp refuses the file.
    """
    llama = _import_llama()
    count, length = windows.shape
    with ExitStack() as cleanup:
        model = _load(llama, path)
        cleanup.callback(llama.llama_model_free, model)
        context = _open_context(llama, model, length)
        if not context:
            raise ExportError(
                f"{path}: llama.cpp cannot make a context of {length} tokens; "
                "use shorter windows"
            )
        cleanup.callback(llama.llama_free, context)
        vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        largest = int(windows.max()) if windows.numel() else 0
        if largest >= vocabulary:
            raise ExportError(
                f"{path}: token {largest} is beyond its vocabulary of {vocabulary}"
            )
        batch = llama.llama_batch_init(length, 0, 1)
        cleanup.callback(llama.llama_batch_free, batch)
        for index in range(count):
            _fill_(batch, windows[index].tolist())
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
            if llama.llama_decode(context, batch) != 0:
                raise ExportError(f"{path}: llama.cpp failed on window {index}")
            logits = np.ctypeslib.as_array(
                llama.llama_get_logits(context), shape=(length, vocabulary)
            )
            yield torch.from_numpy(logits.copy())


def decoded_logits(path: Path, windows: Tensor) -> Iterator[Tensor]:
    """Run windows through a float32 copy of a GGUF file that llama.cpp makes itself.

    Needs disk space beside the file for the copy (4 bytes a weight), which is removed.

    Args:
        path: The file.
        windows: As for :func:`llamacpp_logits`.

    Yields:
        float32 logits ``[T, V]`` for each window.

    Raises:
        MissingDependencyError: llama-cpp-python is not installed.
        ExportError: llama.cpp refuses the file, or the copy cannot be written.
    """
    llama = _import_llama()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".decoded-") as folder:
        copy = Path(folder) / path.name
        params = llama.llama_model_quantize_default_params()
        params.ftype = _FILE_TYPE_F32
        params.allow_requantize = True
        params.nthread = torch.get_num_threads()
        status = llama.llama_model_quantize(
            os.fsencode(path), os.fsencode(copy), ctypes.byref(params)
        )
        if status != 0:
            raise ExportError(
                f"{path}: llama.cpp cannot decode the file to float32; check that "
                f"{path.parent} has space for a copy with 4 bytes a weight, then run "
                "llama-quantize to see llama.cpp's own message"
            )
        yield from llamacpp_logits(copy, windows)


def llamacpp_tokens(path: Path, text: str) -> list[int]:
    """Return the tokens llama.cpp makes of ``text`` with the file's tokenizer.

    Special tokens in the text are recognized; none is added.

    Raises:
        MissingDependencyError: llama-cpp-python is not installed.
        ExportError: llama.cpp refuses the file.
    """
    llama = _import_llama()
    model = _load(llama, path, vocabulary_only=True)
    try:
        data = text.encode()
        tokens = (ctypes.c_int32 * (len(data) + 8))()
        count = llama.llama_tokenize(
            llama.llama_model_get_vocab(model),
            data,
            len(data),
            tokens,
            len(tokens),
            False,
            True,
        )
        return list(tokens[:count])
    finally:
        llama.llama_model_free(model)


def _import_llama() -> Any:
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingDependencyError(
            "llama-cpp-python", extra="verify", purpose="running a GGUF file"
        ) from error
    # llama-cpp-python's own log callback prints what is at or above its logger's level;
    # failures come back as exceptions from here.
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL + 1)
    llama_cpp.llama_backend_init()
    return llama_cpp


def _load(llama: Any, path: Path, *, vocabulary_only: bool = False) -> Any:
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    params.vocab_only = vocabulary_only
    # No weights repacked for one processor: the same numbers on every machine, and on
    # AMX the repacked product of llama-cpp-python 0.3.36 crashes (at ldtilecfg).
    params.use_extra_bufts = False
    model = llama.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise ExportError(
            f"{path}: llama.cpp cannot load the file; "
            "run it in llama-cli to see llama.cpp's own message"
        )
    return model


def _open_context(llama: Any, model: Any, length: int) -> Any:
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = length
    params.n_seq_max = 1
    params.n_threads = params.n_threads_batch = torch.get_num_threads()
    params.type_k = params.type_v = _F32
    params.flash_attn_type = _NO_FLASH_ATTENTION
    params.no_perf = True
    return llama.llama_init_from_model(model, params)


def _fill_(batch: Any, tokens: list[int]) -> None:
    batch.n_tokens = len(tokens)
    for position, token in enumerate(tokens):
        batch.token[position] = token
        batch.pos[position] = position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = True
