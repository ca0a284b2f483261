"""A GGUF file in llama.cpp on the CPU, step by step, for ``compress bench model``.

llama.cpp runs in this process, which is one of its own: memory and processor time that
are read are the model's. Its defaults are left alone, but for two: the number of
threads is torch's, and no weights are repacked for one processor
(:mod:`compress.export.gguf_llama` says why), so that stock llama.cpp may be faster.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from pathlib import Path
from typing import Any

import torch

from compress.core.errors import CheckpointError, MissingDependencyError
from compress.export.gguf_llama import import_llama, load_model
from compress.export.gguf_reader import open_gguf

_F16_BYTES = 2


class LlamaModel:
    """An open GGUF file.

    Args:
        file: The GGUF file.

    Raises:
        MissingDependencyError: llama-cpp-python is not installed.
        ExportError: llama.cpp refuses the file.
    """

    run_as = "llama.cpp"
    dtype = torch.float32

    def __init__(self, file: Path) -> None:
        try:
            self.llama: Any = import_llama()
        except ImportError as error:
            raise MissingDependencyError(
                "llama-cpp-python", extra="verify", purpose="timing a GGUF file"
            ) from error
        self.model: Any = load_model(self.llama, os.fspath(file))
        self.vocabulary: int = self.llama.llama_vocab_n_tokens(
            self.llama.llama_model_get_vocab(self.model)
        )
        self.file = open_gguf(file)

    @property
    def label(self) -> str:
        """What llama.cpp calls the model, and its release."""
        text = ctypes.create_string_buffer(128)
        self.llama.llama_model_desc(self.model, text, len(text))
        return f"{text.value.decode()} in llama.cpp ({self.llama.__version__})"

    @property
    def weights_bytes(self) -> int:
        """Size of all tensors."""
        return int(self.llama.llama_model_size(self.model))

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return int(self.llama.llama_model_n_params(self.model))

    @property
    def multiplied(self) -> int:
        """How many weights a token is multiplied by; a tied embedding is the head."""
        tensors = self.file.tensors
        if "output.weight" not in tensors:
            return self.parameters
        width = self.llama.llama_model_n_embd(self.model)
        return self.parameters - int(self.vocabulary) * int(width)

    def generator(self, prompts: torch.Tensor, new_tokens: int) -> LlamaGenerator:
        """Return what continues prompts, int64 ``[B, T]``."""
        return LlamaGenerator(self, prompts.tolist(), new_tokens)


class LlamaGenerator:
    """Reads prompts and then makes one token after the other for each of them.

    Args:
        model: The open file.
        prompts: Token ids, all of one length.
        new_tokens: Places for them are kept.

    Raises:
        CheckpointError: llama.cpp cannot make the context, or fails on a token.
    """

    is_captured = False
    refusal: str | None = None

    def __init__(
        self, model: LlamaModel, prompts: list[list[int]], new_tokens: int
    ) -> None:
        self._model, self._prompts = model, prompts
        self._start = len(prompts[0])
        llama = model.llama
        params = llama.llama_context_default_params()
        size = len(prompts) * (self._start + new_tokens + 1)
        params.n_ctx = size
        params.n_batch = max(len(prompts) * self._start, len(prompts))
        params.n_seq_max = len(prompts)
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.no_perf = True
        self._context: Any = llama.llama_init_from_model(model.model, params)
        if not self._context:
            raise CheckpointError(
                f"llama.cpp cannot make a context of {size} tokens; use fewer or "
                "shorter sequences"
            )
        self._batch: Any = llama.llama_batch_init(params.n_batch, 0, 1)
        self._next = array("i", [0] * len(prompts))
        self._first = array("i", self._next)
        self._past = 0

    def close(self) -> None:
        """Give the memory of the context back."""
        self._model.llama.llama_batch_free(self._batch)
        self._model.llama.llama_free(self._context)

    @property
    def kv_bytes(self) -> int:
        """Size of all keys and values, in float16."""
        llama, model = self._model.llama, self._model.model
        heads = llama.llama_model_n_head_kv(model)
        width = llama.llama_model_n_embd(model) // llama.llama_model_n_head(model)
        size = self._model.file.architecture_value("attention.key_length", width)
        layers = llama.llama_model_n_layer(model)
        cells = llama.llama_n_ctx(self._context)
        return int(2 * layers * cells * heads * size * _F16_BYTES)

    @property
    def ids(self) -> list[int]:
        """The newest token of each sequence."""
        return list(self._next)

    def prefill(self) -> None:
        """Read all prompts and choose the first token of each."""
        llama = self._model.llama
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        rows = [
            (token, place, number, place == self._start - 1)
            for number, prompt in enumerate(self._prompts)
            for place, token in enumerate(prompt)
        ]
        self._decode(rows)
        self._first = array("i", self._next)
        self._past = self._start

    def rewind(self) -> None:
        """Go back to the end of the prompts; their keys and values stay."""
        llama = self._model.llama
        memory = llama.llama_get_memory(self._context)
        for number in range(len(self._prompts)):
            llama.llama_memory_seq_rm(memory, number, self._start, -1)
        self._next, self._past = array("i", self._first), self._start

    def step(self) -> None:
        """Make one more token for each sequence, the most probable one."""
        self._decode(
            [(token, self._past, i, True) for i, token in enumerate(self._next)]
        )
        self._past += 1

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Run tokens: id, position, sequence, and whether its logits are wanted."""
        import numpy as np  # comes with llama_cpp

        llama, batch = self._model.llama, self._batch
        batch.n_tokens = len(rows)
        wanted: list[tuple[int, int]] = []
        for index, (token, place, number, is_last) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, place
            batch.n_seq_id[index], batch.logits[index] = 1, is_last
            batch.seq_id[index][0] = number
            if is_last:
                wanted.append((index, number))
        if llama.llama_decode(self._context, batch) != 0:
            raise CheckpointError(f"llama.cpp failed on {len(rows)} tokens")
        for index, number in wanted:
            pointer = llama.llama_get_logits_ith(self._context, index)
            logits = np.ctypeslib.as_array(pointer, (self._model.vocabulary,))
            self._next[number] = int(logits.argmax())
