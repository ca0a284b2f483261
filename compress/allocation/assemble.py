"""Measuring assembled candidates: levels swapped into the model, KL to the dense one.

Decoded levels are kept in memory where all of them fit, on the device; else codes are,
as far as they fit, and decoded when a layer changes. Hidden states at the start of each
block are kept from the last candidate, so that the next one runs from the first block
that differs. Log-probabilities of the dense model are computed once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.allocation.store import Level, LevelStore
from compress.core.artifact import ModelDescription, TensorInfo, TensorSource
from compress.core.plan import LayerPlan
from compress.core.tensors import QuantizedTensor
from compress.distributed.team import Team
from compress.model.devices import numbers_at_once
from compress.model.resident import ResidentModel
from compress.model.sources import check_finite
from compress.model.states import BlockCall
from compress.model.streaming import StreamedModel

_TOKENS_A_CALL = 4096
# Log-probabilities beyond this are kept as float16, which moves KL by less than 1e-4.
_EXACT_BYTES = 1 << 30
_SHARE_OF_MEMORY = 0.4  # that weights may take, and that levels may take of the rest


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
        held_bytes: Of levels that may be kept in memory.
        device: Where kept levels lie.
        decoded: Whether they are kept as float32 weights, or as codes, a byte a weight.
    """

    def __init__(
        self,
        source: TensorSource,
        store: LevelStore,
        *,
        held_bytes: int,
        device: str,
        decoded: bool = False,
    ) -> None:
        self._source, self._store = source, store
        self._room, self._device, self._decoded = held_bytes, device, decoded
        self._held: dict[str, QuantizedTensor] = {}
        self._values: dict[str, Tensor] = {}
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
        """Return the float32 weights ``[R, C]`` of a level; not to be changed.

        Raises:
            CheckpointError: They are not finite.
        """
        if level.key in self._values:
            return self._values[level.key]
        read = self._on_device if self._decoded else self._codes
        values = read(level.key).dequantize()
        check_finite(values, f"level {level.key}")
        if self._decoded and values.nbytes <= self._room:
            self._values[level.key] = values
            self._room -= values.nbytes
        return values

    def _codes(self, key: str) -> QuantizedTensor:
        if key in self._held:
            return self._held[key]
        tensor = self._on_device(key)
        size = sum(part.nbytes for part in tensor.state().values())
        if size <= self._room:
            self._held[key] = tensor
            self._room -= size
        return tensor

    def _on_device(self, key: str) -> QuantizedTensor:
        tensor = self._store.read(key)
        parts = {k: v.to(self._device) for k, v in tensor.state().items()}
        return QuantizedTensor.from_state(parts, tensor.scheme, tensor.notes)


def assembled_model(
    description: ModelDescription,
    source: TensorSource,
    store: LevelStore,
    levels: Collection[LayerPlan],
    *,
    device: str,
    dtype: torch.dtype,
) -> StreamedModel:
    """Return the model on a :class:`LevelSource`; in memory as a whole if it fits.

    Args:
        description: The model.
        source: Its dense tensors.
        store: Where codes are read.
        levels: All that may be put in; kept decoded if all of them fit.
        device: Where the model runs.
        dtype: Its arithmetic.
    """
    free = available_bytes(device)
    weights = sum(info.elements for info in description.tensors.values())
    size = weights * dtype.itemsize
    resident = size <= _SHARE_OF_MEMORY * free
    held = int(_SHARE_OF_MEMORY * (free - size)) if resident else 0
    decoded = sum(math.prod(layer.shape) for layer in levels) * torch.float32.itemsize
    swapped = LevelSource(
        source, store, held_bytes=held, device=device, decoded=decoded <= held
    )
    kind = ResidentModel if resident else StreamedModel
    return kind(description, swapped, device=device, dtype=dtype)


class Assembly:
    """The model with any choice of levels, and its KL to the dense one.

    Args:
        model: From :func:`assembled_model`.
        windows: int64 ``[N, T]`` tokens to measure on.
        units: Layers of each unit, by choice.
        levels: Of all these layers.
        team: The processes. Each measures every ``size``-th window, so that all have
            some of the first ones.
    """

    def __init__(
        self,
        model: StreamedModel,
        windows: Tensor,
        units: Sequence[Sequence[Sequence[LayerPlan]]],
        levels: Mapping[LayerPlan, Level],
        team: Team | None = None,
    ) -> None:
        assert isinstance(model.source, LevelSource)
        self._team = team or Team()
        self._count = len(windows)
        self._model, self._windows = model, windows[self._own(len(windows))]
        self._units, self._levels = units, levels
        self._source = model.source
        self._calls: list[BlockCall] = []
        self._inputs: list[Tensor] = []  # of block 0, all windows; one or none
        self._trace: list[Tensor] = []  # inputs of each block, of the last candidate
        self._changed: set[str] = set()  # since that trace
        self._pinned: dict[str, Level] = {}
        self._swap([None] * len(units))  # whatever was put in before
        self._dense: list[Tensor] = []
        self._dense = [
            p.to(self._kept_type(p)) for p in self._predict(len(self._windows))
        ]

    def _own(self, count: int) -> slice:
        """Return which of the first ``count`` windows this process measures."""
        return slice(self._team.rank, count, self._team.size)

    def pin(self, layers: Sequence[LayerPlan]) -> None:
        """Put the levels of layers in that no unit has."""
        self._pinned = {layer.name: self._levels[layer] for layer in layers}

    def measure(self, assignment: Sequence[int | None], share: float = 1.0) -> float:
        """Return the KL of an assignment in nats a token.

        Args:
            assignment: Choice of each unit; ``None`` leaves it dense.
            share: Part of the windows, from the first one on.
        """
        count = max(1, round(share * self._count))
        return max(0.0, float(self.measure_windows(assignment, count).mean()))

    def measure_windows(
        self, assignment: Sequence[int | None], count: int | None = None
    ) -> Tensor:
        """Return the KL of each of the first ``count`` windows, float64 ``[count]``."""
        self._swap(assignment)
        count = self._count if count is None else count
        found: list[Tensor] = []
        predicted = self._predict(len(range(count)[self._own(count)]))
        for dense, logp in zip(self._dense, predicted, strict=False):
            kl = logp.new_zeros((), dtype=torch.float64)
            most = max(1, numbers_at_once(logp.device.type) // logp.shape[1])
            for p, q in zip(
                torch.split(dense, most), torch.split(logp, most), strict=True
            ):
                p = p.float()
                kl += (p.exp() * (p - q)).sum(dtype=torch.float64)
            found.append(kl / len(logp))
        result = torch.zeros(count, dtype=torch.float64)
        if found:
            result[self._own(count)] = torch.stack(found).cpu()
        self._team.add_([result])
        return result

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
        if not count:
            return iter(())
        start = self._first_block(count)
        if start == 0:
            self._trace = [self._embedded()]
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

    def _embedded(self) -> Tensor:
        """Return the inputs of block 0 of all windows."""
        blocks = f"{self._model.description.family.blocks}."
        outside = {name for name in self._changed if not name.startswith(blocks)}
        if not self._inputs or outside - {self._model.description.family.head}:
            states = self._model.embed(self._windows)
            self._calls = states.calls
            self._inputs = [states.hidden.to(self._device)]
        return self._inputs[0]

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
