"""What the original model makes of windows: computed each time, or kept.

Kept are the states that its head reads, which are exact and small: ``T C`` numbers a
window, against ``T V`` logits. They are computed when a window is first trained on, and
stay on the device where it has room for them, else in host memory.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from compress.core.errors import ConfigError
from compress.recovery.losses import Head
from compress.recovery.models import WholeModel

# Of the memory there is, what kept states may take: training needs the rest of a GPU.
_DEVICE_SHARE = 0.4
_HOST_SHARE = 0.5


class Teacher:
    """The model that is learnt from.

    Args:
        model: The original.
        keep: Shape ``[N, T]`` of the training windows whose states are kept; ``None``
            computes them each time.
        section: Of the config, for messages.

    Raises:
        ConfigError: They would take more than half of the host's memory.
    """

    def __init__(
        self, model: WholeModel, *, keep: tuple[int, int] | None, section: str
    ) -> None:
        self._model = model
        self._kept: Tensor | None = None
        if keep is None:
            return
        width = int(model.description.config["hidden_size"])
        needed = keep[0] * keep[1] * width * model.dtype.itemsize
        on_gpu = model.device.type == "cuda"
        if on_gpu and needed <= _DEVICE_SHARE * _memory_of(model.device):
            self._kept = torch.empty(
                *keep, width, dtype=model.dtype, device=model.device
            )
        else:
            _check_host(needed, keep[0], section)
            self._kept = torch.empty(*keep, width, dtype=model.dtype, pin_memory=on_gpu)
        self._known = torch.zeros(keep[0], dtype=torch.bool)

    @property
    def head(self) -> Head:
        """What turns its states into logits."""
        return self._model.head

    @torch.no_grad()
    def states(self, ids: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the head's input ``[B, T, C]``.

        Args:
            ids: int64 ``[B, T]`` on the device.
            rows: int64 ``[B]`` on the CPU, which training windows they are; ``None``
                for others.
        """
        kept = self._kept
        if kept is None or rows is None:
            return self._model.states(ids)
        # Row by row: copies of pinned memory that wait for earlier ones only.
        if bool(self._known[rows].all()):
            found = torch.empty(
                len(rows), *kept.shape[1:], dtype=kept.dtype, device=ids.device
            )
            for place, row in enumerate(rows.tolist()):
                found[place].copy_(kept[row], non_blocking=True)
            return found
        states = self._model.states(ids)
        for place, row in enumerate(rows.tolist()):
            kept[row].copy_(states[place], non_blocking=True)
        self._known[rows] = True
        return states


def _memory_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def _check_host(needed: int, windows: int, section: str) -> None:
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > _HOST_SHARE * there:
        raise ConfigError(
            f"{section}.options.teacher: cache: states of {windows} windows take "
            f"{needed / 1e9:.1f} GB of {there / 1e9:.0f} GB; set teacher: recompute, "
            "or lower samples and generated"
        )
