"""What the original model makes of windows: computed each time, or kept.

Kept are the states that its head reads, which are exact and small: ``T C`` numbers a
window, against ``T V`` logits. They are computed when a window is first trained on.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from compress.core.errors import ConfigError
from compress.recovery.losses import Head
from compress.recovery.models import WholeModel

_SHARE = 0.5  # of the machine's memory that kept states may take


class Teacher:
    """The model that is learnt from.

    Args:
        model: The original.
        keep: Shape ``[N, T]`` of the training windows whose states are kept in host
            memory; ``None`` computes them each time.

    Raises:
        ConfigError: They would take more than half of the memory.
    """

    def __init__(
        self, model: WholeModel, *, keep: tuple[int, int] | None = None
    ) -> None:
        self._model = model
        self._kept: Tensor | None = None
        if keep is None:
            return
        width = int(model.description.config["hidden_size"])
        needed = keep[0] * keep[1] * width * model.dtype.itemsize
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > _SHARE * there:
            raise ConfigError(
                f"tune.options.teacher: cache: states of {keep[0]} windows take "
                f"{needed / 1e9:.1f} GB of {there / 1e9:.0f} GB; set teacher: "
                "recompute, or lower samples and generated"
            )
        pins = model.device.type == "cuda"
        self._kept = torch.empty(*keep, width, dtype=model.dtype, pin_memory=pins)
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
        if bool(self._known[rows].all()):
            # Row by row: copies of pinned memory that wait for earlier ones only.
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
