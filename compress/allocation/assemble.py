"""Measuring assembled candidates: levels swapped into the model, KL to the dense one.

Codes are kept in memory where they fit, on the device, and decoded when a layer
changes. Hidden states at the start of each block are kept from the last candidate, so
that the next one runs from the first block that differs. Log-probabilities of the dense
model are computed once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.allocation.store import Level, LevelStore
from compress.core.artifact import ModelDescription, TensorInfo, TensorSource
from compress.core.plan import LayerPlan
from compress.core.tensors import QuantizedTensor
from compress.model.resident import ResidentModel
from compress.model.states import BlockCall
from compress.model.streaming import StreamedModel

_TOKENS_A_CALL = 4096
_POSITIONS_AT_ONCE = 512
# Log-probabilities beyond this are kept as float16, which moves KL by less than 1e-4.
_EXACT_BYTES = 1 << 30
_SHARE_OF_MEMORY = 0.4  # that weights may take, and that codes may take of the rest


def available_bytes(device: str) -> int:
    """Return how much memory of a device is free."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class LevelSource(TensorSource):
    """The dense tensors of a model with levels in the place of some of them.

    Args:
        source: Dense tensors.
        store: Where codes are read.
        held_bytes: Of codes, one byte a weight, that may be kept in memory.
        device: Where kept codes lie.
    """

    def __init__(
        self, source: TensorSource, store: LevelStore, *, held_bytes: int, device: str
    ) -> None:
        self._source, self._store = source, store
        self._room, self._device = held_bytes, device
        self._held: dict[str, QuantizedTensor] = {}
        self.current: dict[str, Level] = {}

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Describe the tensors of the dense model."""
        return self._source.tensors()

    def read(self, name: str) -> Tensor:
        """Return a tensor; float32 where it is a level."""
        level = self.current.get(name.removesuffix(".weight"))
        if level is None or not name.endswith(".weight"):
            return self._source.read(name)
        return self.values(level)

    def values(self, level: Level) -> Tensor:
        """Return the float32 weights ``[R, C]`` of a level."""
        return self._codes(level.key).dequantize()

    def _codes(self, key: str) -> QuantizedTensor:
        if key in self._held:
            return self._held[key]
        tensor = self._store.read(key)
        parts = {k: v.to(self._device) for k, v in tensor.state().items()}
        tensor = QuantizedTensor.from_state(parts, tensor.scheme, tensor.notes)
        size = sum(part.nbytes for part in parts.values())
        if size <= self._room:
            self._held[key] = tensor
            self._room -= size
        return tensor


def assembled_model(
    description: ModelDescription,
    source: TensorSource,
    store: LevelStore,
    *,
    device: str,
    dtype: torch.dtype,
) -> StreamedModel:
    """Return the model on a :class:`LevelSource`; in memory as a whole if it fits."""
    free = available_bytes(device)
    weights = sum(info.elements for info in description.tensors.values())
    size = weights * dtype.itemsize
    resident = size <= _SHARE_OF_MEMORY * free
    held = int(_SHARE_OF_MEMORY * (free - size)) if resident else 0
    levels = LevelSource(source, store, held_bytes=held, device=device)
    kind = ResidentModel if resident else StreamedModel
    return kind(description, levels, device=device, dtype=dtype)


class Assembly:
    """The model with any choice of levels, and its KL to the dense one.

    Args:
        model: From :func:`assembled_model`.
        windows: int64 ``[N, T]`` tokens to measure on.
        units: Layers of each unit, by choice.
        levels: Of all these layers.
    """

    def __init__(
        self,
        model: StreamedModel,
        windows: Tensor,
        units: Sequence[Sequence[Sequence[LayerPlan]]],
        levels: Mapping[LayerPlan, Level],
    ) -> None:
        assert isinstance(model.source, LevelSource)
        self._model, self._windows = model, windows
        self._units, self._levels = units, levels
        self._source = model.source
        self._calls: list[BlockCall] = []
        self._trace: list[Tensor] = []  # inputs of each block, of the last candidate
        self._changed: set[str] = set()  # since that trace
        self._pinned: dict[str, Level] = {}
        self._dense: list[Tensor] = []
        self._dense = [p.to(self._kept_type(p)) for p in self._predict(len(windows))]

    def pin(self, layers: Sequence[LayerPlan]) -> None:
        """Put the levels of layers in that no unit has."""
        self._pinned = {layer.name: self._levels[layer] for layer in layers}

    def measure(self, assignment: Sequence[int | None], share: float = 1.0) -> float:
        """Return the KL of an assignment in nats a token.

        Args:
            assignment: Choice of each unit; ``None`` leaves it dense.
            share: Part of the windows, from the first one on.
        """
        self._swap(assignment)
        count = max(1, round(share * len(self._windows)))
        total, tokens = 0.0, 0
        for dense, logp in zip(self._dense, self._predict(count), strict=False):
            for p, q in zip(
                torch.split(dense, _POSITIONS_AT_ONCE),
                torch.split(logp, _POSITIONS_AT_ONCE),
                strict=True,
            ):
                p = p.float()
                total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
            tokens += len(logp)
        return max(0.0, total / tokens)

    def _kept_type(self, logp: Tensor) -> torch.dtype:
        size = logp.numel() * 4 * len(self._windows)
        return torch.float32 if size <= _EXACT_BYTES else torch.float16

    def _swap(self, assignment: Sequence[int | None]) -> None:
        wanted = dict(self._pinned)
        for unit, index in zip(self._units, assignment, strict=True):
            if index is not None:
                wanted |= {layer.name: self._levels[layer] for layer in unit[index]}
        present = self._source.current
        names = {*wanted, *present}
        changed = {n for n in names if wanted.get(n) != present.get(n)}
        self._source.current = wanted
        if isinstance(self._model, ResidentModel):
            self._model.refresh(changed)
        self._changed |= changed

    @torch.no_grad()
    def _predict(self, count: int) -> Iterator[Tensor]:
        """Return float32 log-probabilities ``[T - 1, V]`` of the first windows."""
        start = self._first_block(count)
        if start == 0:
            states = self._model.embed(self._windows[:count])
            self._calls = states.calls
            self._trace = [states.hidden.to(self._device)]
        hidden = self._trace[start][:count]
        self._trace = [states[:count] for states in self._trace[: start + 1]]
        blocks = range(start, self._model.description.block_count)
        size = max(1, _TOKENS_A_CALL // hidden.shape[1])
        for index in blocks:
            with self._model.block(index):
                call = self._calls[index]
                parts = torch.split(hidden, size)
                outputs = [self._model.call_block(index, x, call) for x in parts]
            hidden = torch.cat(outputs)
            self._trace.append(hidden)
        self._changed = set()
        return self._log_probabilities(self._trace.pop())

    @property
    def _device(self) -> torch.device:
        return self._model.device

    def _first_block(self, count: int) -> int:
        """Return the first block whose output differs from what is kept."""
        family = self._model.description.family
        if not self._trace or len(self._trace[0]) < count:
            return 0
        start = len(self._trace) - 1
        for name in self._changed - {family.head}:
            if not name.startswith(f"{family.blocks}."):
                return 0
            inside = name.removeprefix(f"{family.blocks}.")
            start = min(start, int(inside.partition(".")[0]))
        return start

    def _log_probabilities(self, hidden: Tensor) -> Iterator[Tensor]:
        with self._model.head(on_device=True) as head:
            for states in hidden:
                yield torch.log_softmax(head(states[:-1]), -1)
