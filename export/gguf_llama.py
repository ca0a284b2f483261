"""llama.cpp in a process of its own, which may crash without taking a run with it.

:mod:`compress.export.gguf_runtime` starts it as ``COMMAND FILE ARGUMENTS``, with tokens
or text on stdin. Answers go to stdout: a line of JSON each, and behind one that says
``logits`` the float32 numbers. No torch here: it would take most of the start.

Settings take away what is llama.cpp's choice rather than the file's: float32 instead of
float16 keys and values, no flash attention, one batch a window, no token added.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

from compress.core.errors import ExportError

Answer: TypeAlias = tuple[dict[str, Any], bytes | memoryview]
"""What is said, and the bytes behind it."""

_F32 = 0  # ggml_type
_FILE_TYPE_F32 = 0  # llama_ftype
_NO_FLASH_ATTENTION = 0  # llama_flash_attn_type


def main() -> None:
    """Answer the request on the command line."""
    command, path, *numbers = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what llama.cpp itself prints is no answer
    try:
        for about, data in _COMMANDS[command](import_llama(), path, *numbers):
            answers.write(json.dumps(about).encode() + b"\n")
            answers.write(data)
            answers.flush()
    except ExportError as error:
        answers.write(json.dumps({"error": str(error)}).encode() + b"\n")
    answers.close()


def _logits(
    llama: Any, path: str, threads: str, count: str, length: str
) -> Iterator[Answer]:
    tokens = array("i", sys.stdin.buffer.read())
    size = int(length)
    with ExitStack() as cleanup:
        model = load_model(llama, path)
        cleanup.callback(llama.llama_model_free, model)
        context = _open_context(llama, model, size, threads=int(threads))
        if not context:
            raise ExportError(
                f"llama.cpp cannot make a context of {size} tokens; use shorter windows"
            )
        cleanup.callback(llama.llama_free, context)
        vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        largest = max(tokens, default=0)
        if largest >= vocabulary:
            raise ExportError(
                f"token {largest} is beyond its vocabulary of {vocabulary}"
            )
        batch = llama.llama_batch_init(size, 0, 1)
        cleanup.callback(llama.llama_batch_free, batch)
        for index in range(int(count)):
            _fill_(batch, tokens[index * size : (index + 1) * size])
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
            if llama.llama_decode(context, batch) != 0:
                raise ExportError(f"llama.cpp failed on window {index}")
            kind = ctypes.POINTER(ctypes.c_float * (size * vocabulary))
            values = ctypes.cast(llama.llama_get_logits(context), kind).contents
            yield {"logits": [size, vocabulary]}, memoryview(values).cast("B")


def _scores(
    llama: Any, path: str, threads: str, length: str, branches: str
) -> Iterator[Answer]:
    """Answer each layout of stdin: log-likelihoods of its reads, and which are greedy.

    A layout is its number of tokens and of reads, then token, position and owner of
    each token, then place and token of each read.
    """
    given = array("i", sys.stdin.buffer.read())
    with ExitStack() as cleanup:
        model = load_model(llama, path)
        cleanup.callback(llama.llama_model_free, model)
        size, count = int(length), int(branches)
        context = _open_context(
            llama, model, size, threads=int(threads), sequences=count
        )
        if not context:
            raise ExportError(f"llama.cpp cannot make a context of {size} tokens")
        cleanup.callback(llama.llama_free, context)
        vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        batch = llama.llama_batch_init(size, 0, count)
        cleanup.callback(llama.llama_batch_free, batch)
        at = 0
        while at < len(given):
            tokens, reads = given[at], given[at + 1]
            middle, end = at + 2 + 3 * tokens, at + 2 + 3 * tokens + 2 * reads
            _lay_(batch, given[at + 2 : middle], count)
            places, wanted = given[middle:end:2], given[middle + 1 : end : 2]
            if max(*batch.token[:tokens], *wanted) >= vocabulary:
                raise ExportError(f"a token is beyond its vocabulary of {vocabulary}")
            for place in places:
                batch.logits[place] = True
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
            if llama.llama_decode(context, batch) != 0:
                raise ExportError(f"llama.cpp failed on a sequence of {tokens} tokens")
            yield _read_off(llama, context, places, wanted, vocabulary), b""
            at = end


def _generate(
    llama: Any, path: str, threads: str, length: str, most: str, stops: str
) -> Iterator[Answer]:
    """Answer each prompt of stdin, its length before its tokens, greedily.

    An answer ends at ``most`` tokens, where the context is full, at a token that ends
    generation, or once its text holds one of ``stops``, a JSON list.
    """
    given = array("i", sys.stdin.buffer.read())
    marks = [text.encode() for text in json.loads(stops)]
    with ExitStack() as cleanup:
        model = load_model(llama, path)
        cleanup.callback(llama.llama_model_free, model)
        size = int(length)
        context = _open_context(llama, model, size, threads=int(threads))
        if not context:
            raise ExportError(f"llama.cpp cannot make a context of {size} tokens")
        cleanup.callback(llama.llama_free, context)
        batch = llama.llama_batch_init(size, 0, 1)
        cleanup.callback(llama.llama_batch_free, batch)
        at = 0
        while at < len(given):
            prompt = given[at + 1 : at + 1 + given[at]]
            at += 1 + given[at]
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
            yield (
                {
                    "tokens": _go_on(
                        llama, model, context, batch, prompt, int(most), marks
                    )
                },
                b"",
            )


def _go_on(
    llama: Any,
    model: Any,
    context: Any,
    batch: Any,
    prompt: array[int],
    most: int,
    stops: Sequence[bytes],
) -> list[int]:
    import numpy as np  # comes with llama_cpp

    vocabulary = llama.llama_model_get_vocab(model)
    count = llama.llama_vocab_n_tokens(vocabulary)
    piece = ctypes.create_string_buffer(256)
    found: list[int] = []
    text, tokens, past = b"", prompt, 0
    while len(found) < most and past + len(tokens) <= llama.llama_n_ctx(context):
        _fill_(batch, tokens, past=past)
        if llama.llama_decode(context, batch) != 0:
            raise ExportError(f"llama.cpp failed at token {past}")
        past += len(tokens)
        pointer = llama.llama_get_logits_ith(context, len(tokens) - 1)
        token = int(np.ctypeslib.as_array(pointer, (count,)).argmax())
        if llama.llama_vocab_is_eog(vocabulary, token):
            break
        found.append(token)
        size = llama.llama_token_to_piece(vocabulary, token, piece, 256, 0, True)
        text += piece.raw[: max(0, size)]
        if any(stop in text for stop in stops):
            break
        tokens = array("i", [token])
    return found


def _lay_(batch: Any, layout: array[int], branches: int) -> None:
    """Put a layout into a batch, where no token asks for logits yet."""
    batch.n_tokens = len(layout) // 3
    for index in range(batch.n_tokens):
        token, position, owner = layout[3 * index : 3 * index + 3]
        owners = range(branches) if owner < 0 else (owner,)
        batch.token[index] = token
        batch.pos[index] = position
        batch.n_seq_id[index] = len(owners)
        for number, sequence in enumerate(owners):
            batch.seq_id[index][number] = sequence
        batch.logits[index] = False


def _read_off(
    llama: Any,
    context: Any,
    places: Sequence[int],
    wanted: Sequence[int],
    vocabulary: int,
) -> dict[str, Any]:
    import numpy as np  # comes with llama_cpp

    nats, greedy = [], []
    for place, token in zip(places, wanted, strict=True):
        pointer = llama.llama_get_logits_ith(context, place)
        logits = np.ctypeslib.as_array(pointer, (vocabulary,)).astype(np.float64)
        top = logits.max()
        nats.append(float(logits[token] - top - np.log(np.exp(logits - top).sum())))
        greedy.append(bool(logits.argmax() == token))
    return {"nats": nats, "greedy": greedy}


def _decode(llama: Any, path: str, threads: str, copy: str) -> Iterator[Answer]:
    params = llama.llama_model_quantize_default_params()
    params.ftype = _FILE_TYPE_F32
    params.allow_requantize = True
    params.nthread = int(threads)
    status = llama.llama_model_quantize(
        os.fsencode(path), os.fsencode(copy), ctypes.byref(params)
    )
    if status != 0:
        raise ExportError(
            "llama.cpp cannot decode the file to float32; check that "
            f"{os.path.dirname(path)} has space for a copy with 4 bytes a weight, then "
            "run llama-quantize to see llama.cpp's own message"
        )
    yield {}, b""


def _tokens(llama: Any, path: str) -> Iterator[Answer]:
    data = sys.stdin.buffer.read()
    model = load_model(llama, path, vocabulary_only=True)
    tokens = (ctypes.c_int32 * (len(data) + 8))()
    vocabulary = llama.llama_model_get_vocab(model)
    count = llama.llama_tokenize(
        vocabulary, data, len(data), tokens, len(tokens), False, True
    )
    llama.llama_model_free(model)
    yield {"tokens": list(tokens[:count])}, b""


def _speed(
    llama: Any, path: str, threads: str, tokens: str, repeats: str
) -> Iterator[Answer]:
    """Write tokens one at a time, as a chat does, and say how long each round took.

    Which token follows is not asked: every step costs the same, whatever it is.
    """
    size = int(tokens)
    with ExitStack() as cleanup:
        model = load_model(llama, path)
        cleanup.callback(llama.llama_model_free, model)
        context = _open_context(llama, model, size, threads=int(threads))
        if not context:
            raise ExportError(f"llama.cpp cannot make a context of {size} tokens")
        cleanup.callback(llama.llama_free, context)
        batch = llama.llama_batch_init(1, 0, 1)
        cleanup.callback(llama.llama_batch_free, batch)
        for round_ in range(int(repeats) + 1):  # the first one reads the file
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
            started = time.perf_counter()
            for place in range(size):
                _fill_(batch, array("i", [1 + place % 97]))
                batch.pos[0] = place
                if llama.llama_decode(context, batch) != 0:
                    raise ExportError(f"llama.cpp failed on token {place}")
            llama.llama_synchronize(context)
            if round_:
                yield {"seconds": time.perf_counter() - started}, b""


_COMMANDS: dict[str, Callable[..., Iterator[Answer]]]
_COMMANDS = {
    "logits": _logits,
    "scores": _scores,
    "generate": _generate,
    "decode": _decode,
    "tokens": _tokens,
    "speed": _speed,
}


def import_llama() -> Any:
    """Return the module ``llama_cpp``, ready and quiet."""
    import llama_cpp

    # llama-cpp-python's own log callback prints what is at or above its logger's level;
    # failures come back as answers from here.
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL + 1)
    llama_cpp.llama_backend_init()
    return llama_cpp


def load_model(llama: Any, path: str, *, vocabulary_only: bool = False) -> Any:
    """Return a model on the CPU, to be freed by ``llama_model_free``.

    Raises:
        ExportError: llama.cpp refuses the file.
    """
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    params.vocab_only = vocabulary_only
    # No weights repacked for one processor: the same numbers on every machine, and on
    # AMX the repacked product of llama-cpp-python 0.3.36 crashes (at ldtilecfg).
    params.use_extra_bufts = False
    model = llama.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise ExportError(
            "llama.cpp cannot load the file; "
            "run it in llama-cli to see llama.cpp's own message"
        )
    return model


def _open_context(
    llama: Any, model: Any, length: int, *, threads: int, sequences: int = 1
) -> Any:
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = length
    params.n_seq_max = sequences
    params.kv_unified = True  # a token may be part of several sequences
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = _F32
    params.flash_attn_type = _NO_FLASH_ATTENTION
    params.no_perf = True
    return llama.llama_init_from_model(model, params)


def _fill_(batch: Any, tokens: array[int], *, past: int = 0) -> None:
    batch.n_tokens = len(tokens)
    for position, token in enumerate(tokens):
        batch.token[position] = token
        batch.pos[position] = past + position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = True
