"""What autograd saves of plain DKM, moved to the host and made small.

Around a forward of plain DKM, each tensor that autograd would keep is packed:

* *offloading*: it is copied to the host;
* *marshaling*: several operations save one storage as different tensors (views,
  transposes); it is copied once, and each view is replayed on it;
* *uniquification*: rows of weights of one value are equal, so that one row of each
  value and a 16-bit index for each weight say all;
* *sharding*: the index is the same for all learners of data-parallel training; each
  keeps a part and gathers the others in backward.

Source: Cho et al. (2023), "eDKM", arXiv 2309.00964, sections 2.1 to 2.3. Differs: the
paper walks a few steps of the graph to find a storage that was copied before, here the
storage itself is recognised; rows are compared before they are dropped, so gradients
are equal to the last bit. Use: vectors of weights, for which ``table_domain`` does not
hold, and as its yardstick. It encloses the forward of DKM only, never a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from compress.core.codebooks import from_stored
from compress.core.errors import CompressError
from compress.tuning.dkm.unique import Unique

_LEAST_VALUES = 1 << 16


class SharedIndex:
    """The row of each weight among the rows that are kept, on one or many learners.

    Args:
        unique: Distinct values of the weights. All learners must have the same.
        learners: Process group whose members each keep a part; ``None`` keeps all. Its
            backend must gather tensors of the device that the weights are on.
    """

    def __init__(
        self, unique: Unique, learners: dist.ProcessGroup | None = None
    ) -> None:
        groups, width = unique.first.shape
        self._device = unique.stored.device
        self._shape, self._width, self._learners = unique.stored.shape, width, learners
        flat = unique.stored.reshape(-1)
        if learners is not None:
            size, rank = dist.get_world_size(learners), dist.get_rank(learners)
            share = -(-flat.numel() // size)
            part = flat[rank * share : (rank + 1) * share]
            flat = torch.nn.functional.pad(part, (0, share - part.numel()))
        self._part = flat.to("cpu", copy=True)
        start = torch.arange(groups, device=self._device).view(-1, 1)
        self.first = (unique.first + start * self._shape[1]).view(-1)  # [G * U]

    @property
    def nbytes(self) -> int:
        """Bytes of the part that this learner keeps."""
        return self._part.nbytes

    def rows(self) -> Tensor:
        """Return the kept row of each weight, int64 ``[G * n]``.

        With learners this is a collective operation.
        """
        part = self._part.to(self._device)
        if self._learners is not None:
            size = dist.get_world_size(self._learners)
            whole = part.new_empty(size, part.numel())
            # Bytes: not every backend gathers 16-bit integers.
            parts = list(whole.view(torch.uint8))
            dist.all_gather(parts, part.view(torch.uint8), self._learners)
            part = whole.view(-1)[: self._shape.numel()]
        places = from_stored(part).view(self._shape)
        start = torch.arange(self._shape[0], device=self._device).view(-1, 1)
        return (places + start * self._width).view(-1)


@dataclass(frozen=True)
class _Kept:
    """A storage on the host: all of it, or one row of ``k`` numbers for each value."""

    content: Tensor
    index: SharedIndex | None

    def restored(self, device: torch.device) -> Tensor:
        """Return the whole storage as a flat tensor."""
        content = self.content.to(device)
        if self.index is None:
            return content
        return content.index_select(0, self.index.rows()).view(-1)


@dataclass(frozen=True)
class _View:
    kept: _Kept
    size: Sequence[int]
    stride: Sequence[int]
    offset: int
    device: torch.device


@dataclass(frozen=True)
class _Alias:
    tensor: Tensor
    version: int


class SavedOnHost:
    """Context in which autograd saves what it needs on the host.

    Leaves (parameters, and tensors without history, such as tables) are left alone,
    since somebody else holds them, and so are small tensors. What was saved stays valid
    after the context is left, for one or more backward passes.

    Args:
        marshal: Copy each storage once.
        index: Rows of weights of one value, to keep one of each; ``None`` keeps all.
        least_values: Smaller tensors are left where they are.

    Attributes:
        saved_bytes: Held for backward so far, in all contexts of this object.
        rows_kept: Storages of which one row for each value was kept.
        whole_kept: Storages that were kept as a whole.
    """

    def __init__(
        self,
        *,
        marshal: bool = True,
        index: SharedIndex | None = None,
        least_values: int = _LEAST_VALUES,
    ) -> None:
        self._marshal, self._index, self._least = marshal, index, least_values
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None
        self._places: Tensor | None = None  # rows of all weights, while in the context
        # The weak reference keeps the identity of a storage from being used again, and
        # its memory not: storages are freed as they would be without it.
        self._known: dict[tuple[int, int], tuple[StorageWeakRef, _Kept]] = {}
        self.saved_bytes = 0 if index is None else index.nbytes
        self.rows_kept = self.whole_kept = 0

    def __enter__(self) -> SavedOnHost:
        """Start to pack what is saved."""
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        self._places = None if self._index is None else self._index.rows()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop, and forget the storages that were seen."""
        assert self._hooks is not None
        self._hooks.__exit__(kind, error, trace)
        self._hooks = self._places = None
        self._known.clear()

    def _pack(self, tensor: Tensor) -> _View | _Alias:
        base = tensor._base if tensor._base is not None else tensor
        if base.is_leaf or tensor.numel() < self._least:
            return _Alias(tensor.detach(), tensor._version)
        place = tensor.size(), tensor.stride(), int(tensor.storage_offset())
        return _View(self._keep(tensor.detach()), *place, tensor.device)

    def _keep(self, tensor: Tensor) -> _Kept:
        storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        key = (storage.cdata, tensor._version)
        if self._marshal and key in self._known:
            return self._known[key][1]
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        kept = self._smallest(tensor.as_strided((size,), (1,), 0))
        self.saved_bytes += kept.content.nbytes
        if self._marshal:
            self._known[key] = storage, kept
        return kept

    def _smallest(self, flat: Tensor) -> _Kept:
        index = self._index
        if index is not None and self._places is not None:
            table = _rows(flat, self._places, index.first)
            if table is not None:
                self.rows_kept += 1
                return _Kept(table.cpu(), index)
        self.whole_kept += 1
        return _Kept(flat.to("cpu", copy=True), None)


def _rows(flat: Tensor, places: Tensor, first: Tensor) -> Tensor | None:
    """Return one row for each value, if all weights of a value have equal rows."""
    if flat.numel() % places.numel():
        return None
    rows = flat.view(places.numel(), -1)
    table = rows.index_select(0, first)
    step = max(1, _LEAST_VALUES * 64 // rows.shape[1])
    same = torch.ones((), dtype=torch.bool, device=flat.device)
    for start in range(0, places.numel(), step):
        part = slice(start, start + step)
        same &= (table.index_select(0, places[part]) == rows[part]).all()
    return table if bool(same) else None


def _unpack(packed: _View | _Alias) -> Tensor:
    if isinstance(packed, _Alias):
        if packed.tensor._version != packed.version:
            raise CompressError(
                "a tensor that backward of DKM needs was changed in place since "
                "forward; call backward before the optimizer's step"
            )
        return packed.tensor
    flat = packed.kept.restored(packed.device)
    return flat.as_strided(packed.size, packed.stride, packed.offset)
