"""Runs GGUF files in llama.cpp, to check them with the program that will use them.

llama.cpp runs in a child process (:mod:`compress.export.gguf_llama`): a crash in its
kernels ends that process and is an error here, not the end of a run that has done all
its work. Logits come through a pipe, one window at a time.

On a CPU llama.cpp rounds activations to 8 bits (groups of 32) before every product with
a quantized matrix, and no setting changes that. On SmolLM2-135M with Q4_0 layers that
alone moves the output by a mean KL of 4e-3 (four WikiText-2 windows of 512; the same
rounding put into PyTorch moves it by 4e-3 as well), which hides any defect of the file
below that. So there are two runs: :func:`llamacpp_logits`, as users run the file, and
:func:`decoded_logits`, where llama.cpp first decodes the file to float32 with its own
reader. The second says whether the file holds the model (4e-11 in the same setting).
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from compress.core.continuations import Continuation, Likelihood, lay_out, totals
from compress.core.errors import ExportError, MissingDependencyError
from compress.core.foreign import parse_json

_FLOAT_BYTES = 4


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
        ExportError: llama.cpp refuses the file, or crashes.
    """
    yield from _logits(path, windows, shown=path)


def llamacpp_scores(
    path: Path, groups: Sequence[Sequence[Continuation]]
) -> Iterator[list[Likelihood]]:
    """Score continuations in llama.cpp on the CPU.

    Args:
        path: The file.
        groups: Continuations, those of one context together: they share its pass.

    Yields:
        The likelihoods of each group.

    Raises:
        MissingDependencyError: llama-cpp-python is not installed.
        ExportError: llama.cpp refuses the file, or crashes, or logits are not finite.
    """
    layouts = [lay_out(group) for group in groups]
    given = array("i")
    for layout in layouts:
        given.extend([len(layout.tokens), len(layout.reads)])
        columns = zip(layout.tokens, layout.positions, layout.owners, strict=True)
        given.extend(chain.from_iterable(columns))
        given.extend(chain.from_iterable(read[:2] for read in layout.reads))
    length = max(len(layout.tokens) for layout in layouts)
    branches = max(layout.count for layout in layouts)
    numbers = (torch.get_num_threads(), length, branches)
    answers = _answers("scores", path, *numbers, given=given.tobytes(), shown=path)
    for layout, answer in zip(layouts, answers, strict=True):
        if not all(map(math.isfinite, answer["nats"])):
            raise ExportError(f"{path}: llama.cpp yields NaN or infinite logits")
        yield totals(layout, answer["nats"], answer["greedy"])


def llamacpp_generate(
    path: Path, prompts: Sequence[Sequence[int]], *, most: int, stops: Sequence[str]
) -> Iterator[list[int]]:
    """Go on with prompts greedily in llama.cpp on the CPU.

    Args:
        path: The file.
        prompts: Token ids.
        most: Tokens of an answer at most.
        stops: An answer ends once its text holds one of them.

    Yields:
        Tokens of each answer, without the one that ended it.

    Raises:
        MissingDependencyError: llama-cpp-python is not installed.
        ExportError: llama.cpp refuses the file, or crashes.
    """
    given = array("i")
    for prompt in prompts:
        given.extend([len(prompt), *prompt])
    length = max(len(prompt) for prompt in prompts) + most
    words = (torch.get_num_threads(), length, most, json.dumps(list(stops)))
    answers = _answers("generate", path, *words, given=given.tobytes(), shown=path)
    for _, answer in zip(prompts, answers, strict=True):
        yield answer["tokens"]


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
        ExportError: llama.cpp refuses the file or crashes, or the copy cannot be
            written.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".decoded-") as folder:
        copy = Path(folder) / path.name
        list(_answers("decode", path, torch.get_num_threads(), copy, shown=path))
        yield from _logits(copy, windows, shown=path)


def llamacpp_tokens(path: Path, text: str) -> list[int]:
    """Return the tokens llama.cpp makes of ``text`` with the file's tokenizer.

    Special tokens in the text are recognized; none is added.

    Raises:
        MissingDependencyError: llama-cpp-python is not installed.
        ExportError: llama.cpp refuses the file, or crashes.
    """
    (answer,) = _answers("tokens", path, given=text.encode(), shown=path)
    return [int(token) for token in answer["tokens"]]


def llamacpp_seconds(path: Path, *, tokens: int, repeats: int) -> list[float]:
    """Return the seconds that llama.cpp takes to write tokens one by one, by round.

    On the CPU, with torch's number of threads, float32 keys and values and no weights
    repacked for the processor: stock llama.cpp may be faster, for all files alike.

    Raises:
        MissingDependencyError: llama-cpp-python is not installed.
        ExportError: llama.cpp refuses the file, or crashes.
    """
    numbers = torch.get_num_threads(), tokens, repeats
    answers = _answers("speed", path, *numbers, shown=path)
    return [float(answer["seconds"]) for answer in answers]


def _logits(path: Path, windows: Tensor, *, shown: Path) -> Iterator[Tensor]:
    numbers = (torch.get_num_threads(), *windows.shape)
    given = windows.to(torch.int32).numpy().tobytes()
    for answer in _answers("logits", path, *numbers, given=given, shown=shown):
        yield answer["logits"]


def _answers(
    command: str, path: Path, *arguments: object, given: bytes = b"", shown: Path
) -> Iterator[dict[str, Any]]:
    """Yield the answers of a child process, with tensors in the place of shapes.

    Args:
        command: One of :mod:`compress.export.gguf_llama`.
        path: The file.
        *arguments: Of the command.
        given: What it reads on stdin.
        shown: The file that errors name.
    """
    if find_spec("llama_cpp") is None:
        raise MissingDependencyError(
            "llama-cpp-python", extra="verify", purpose="running a GGUF file"
        )
    with (
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stderr,
        _start([command, path, *arguments], stdin, stderr, given=given) as child,
    ):
        assert child.stdout is not None
        try:
            while (answer := _read(child.stdout)) is not None:
                if "error" in answer:
                    raise ExportError(f"{shown}: {answer['error']}")
                yield answer
            if child.wait() != 0:
                stderr.seek(0)
                said = stderr.read().decode("utf-8", "replace")
                raise ExportError(_epitaph(shown, child.returncode, said))
        finally:
            child.kill()  # if nobody wants the rest; no effect after its end


def _start(
    words: list[object], stdin: IO[bytes], stderr: IO[bytes], *, given: bytes
) -> subprocess.Popen[bytes]:
    stdin.write(given)
    stdin.seek(0)
    places = [place for place in sys.path if isinstance(place, str)]
    # The same modules as here, wherever this process found them.
    code = (
        f"import sys; sys.path[:] = {places!r}; "
        "from compress.export.gguf_llama import main; main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )


def _read(pipe: IO[bytes]) -> dict[str, Any] | None:
    """Return the next answer, or ``None`` where the child ended, even inside of one."""
    line = pipe.readline()
    if not line.endswith(b"\n"):
        return None
    answer: dict[str, Any] = parse_json(line)
    if "logits" in answer:
        shape = answer["logits"]
        values = bytearray(shape[0] * shape[1] * _FLOAT_BYTES)
        rest = memoryview(values)
        while rest:
            size = pipe.readinto(rest)  # type: ignore[attr-defined]
            if not size:
                return None
            rest = rest[size:]
        answer["logits"] = torch.frombuffer(values, dtype=torch.float32).view(shape)
    return answer


def _epitaph(path: Path, status: int, said: str) -> str:
    """Return what a child died of, its last words, and what to do."""
    last = (said.strip().splitlines() or [""])[-1].strip()
    words = f" ({last})" if last else ""
    if status == -signal.SIGKILL:
        return (
            f"{path}: llama.cpp was killed (SIGKILL){words}, most likely for want of "
            "memory; free some, then check the file again"
        )
    how = f"ended with status {status}"
    if status < 0:
        known = {int(s): s.name for s in signal.Signals}
        how = f"crashed ({known.get(-status, f'signal {-status}')})"
    return (
        f"{path}: llama.cpp {how}{words}; the file may be good all the same: run it in "
        "llama-cli, or install another release of llama-cpp-python"
    )
