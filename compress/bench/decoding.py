"""Generation with a cache of fixed size, step by step or as a CUDA graph.

Greedy, a fixed number of tokens, no stopping: two models that would stop at different
places do the same work here. A graph holds one step: the model, the choice of the next
token, and the move to the next position, so a replay is a token for each sequence.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

_LOG = logging.getLogger(__name__)
_WARM_UP = 3
_ROUND = 64  # lengths that attention's kernels like


class FixedCache(Cache):  # type: ignore[misc]
    """Keys and values of fixed size; whoever runs the model says where to write.

    Attributes:
        positions: int64 ``[T]``, the places of the tokens of the next pass.
    """

    positions: Tensor

    def __init__(self, length: int) -> None:
        super().__init__(layers=[])
        self.length = length
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[B, heads, T, size]``; return those of all places."""
        if layer_idx not in self._stored:
            self._stored[layer_idx] = (
                self._zeros(key_states),
                self._zeros(value_states),
            )
        keys, values = self._stored[layer_idx]
        keys.index_copy_(2, self.positions, key_states)
        values.index_copy_(2, self.positions, value_states)
        return keys, values

    @property
    def bytes(self) -> int:
        """Size of all keys and values."""
        return sum(t.nbytes for pair in self._stored.values() for t in pair)

    def _zeros(self, states: Tensor) -> Tensor:
        batch, heads, _, size = states.shape
        return states.new_zeros((batch, heads, self.length, size))


class Generator:
    """A model that reads a prompt and then makes one token after the other.

    Args:
        model: Of transformers, in evaluation mode.
        prompt: int64 ``[B, T]`` on the model's device.
        new_tokens: Places for them are kept.
    """

    def __init__(self, model: Any, prompt: Tensor, new_tokens: int) -> None:
        self._model, self._prompt = model, prompt
        self._device = prompt.device
        batch, self._start = prompt.shape
        length = -(-(self._start + new_tokens + _WARM_UP + 1) // _ROUND) * _ROUND
        self.cache = FixedCache(length)
        self._places = torch.arange(length, device=self._device)
        self._prompt_places = self._places[: self._start].clone()
        self._place = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=self._device)
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self.refusal: str | None = None

    @property
    def ids(self) -> Tensor:
        """The newest token of each sequence, ``[B, 1]``."""
        return self._ids

    @property
    def kv_bytes(self) -> int:
        """Size of all keys and values."""
        return self.cache.bytes

    def close(self) -> None:
        """Do nothing: memory is given back with the generator."""

    def prefill(self) -> None:
        """Read the prompt and choose the first token."""
        self._run("prefill", self._prefill)

    def step(self) -> None:
        """Make one more token for each sequence."""
        self._run("step", self._step)

    def rewind(self) -> None:
        """Go back to the end of the prompt; its keys and values stay."""
        self._place.fill_(self._start)

    def capture(self) -> None:
        """Record prefill and step as CUDA graphs; say why if that is not possible."""
        try:
            for name, work in (("prefill", self._prefill), ("step", self._step)):
                self._graphs[name] = self._captured(work)
        except Exception as error:  # whatever a model's code does that graphs forbid
            self._graphs.clear()
            torch.cuda.synchronize(self._device)
            self.refusal = str(error).strip().splitlines()[0]
            _LOG.warning("no CUDA graphs: %s", self.refusal)

    @property
    def is_captured(self) -> bool:
        """Whether CUDA graphs run."""
        return bool(self._graphs)

    def _run(self, name: str, work: Any) -> None:
        graph = self._graphs.get(name)
        if graph is not None:
            graph.replay()
        else:
            work()

    def _captured(self, work: Any) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                work()
        torch.cuda.current_stream(self._device).wait_stream(side)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph

    def _prefill(self) -> None:
        logits = self._logits(self._prompt, self._prompt_places)
        self._ids.copy_(logits.argmax(-1))
        self._place.fill_(self._start)

    def _step(self) -> None:
        logits = self._logits(self._ids, self._place)
        self._ids.copy_(logits.argmax(-1))
        self._place.add_(1)

    def _logits(self, ids: Tensor, places: Tensor) -> Tensor:
        """Return the logits ``[B, 1, V]`` after the last token."""
        dtype = self._model.dtype
        hidden = self._places[None] > places[:, None]  # [T, L]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=self._device)
        mask = mask.masked_fill(hidden, torch.finfo(dtype).min)
        self.cache.positions = places
        found = self._model(
            input_ids=ids,
            attention_mask=mask[None, None].expand(len(ids), 1, -1, -1),
            position_ids=places[None].expand(len(ids), -1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = found.logits
        return logits
