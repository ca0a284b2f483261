"""Sums of squared inputs of all linear layers: one pass of the dense model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.core.errors import CalibrationError
from compress.core.statistics import InputSquares
from compress.distributed.team import Team
from compress.model.streaming import StreamedModel
from compress.progress import progress_bar


def measure_squares(
    model: StreamedModel,
    windows: Tensor,
    *,
    sources: Sequence[str],
    team: Team | None = None,
) -> InputSquares:
    """Run calibration text, and return the squared inputs of each layer of each block.

    Args:
        model: The dense model; one block of it is in memory at a time.
        windows: int64 ``[N, T]`` tokens.
        sources: Names of the texts.
        team: The processes, of which each runs its share of the windows.

    Raises:
        CalibrationError: Inputs are not finite.
    """
    team = team or Team()
    description = model.description
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    states = model.embed(team.share(windows))
    blocks = range(description.block_count)
    for index in progress_bar(blocks, desc="inputs", unit="block", leave=False):
        prefix = f"{description.family.block(index)}."
        widths = {
            linear.path: description.tensors[f"{prefix}{linear.path}.weight"].shape[1]
            for linear in description.block_linears(index)
        }
        found = {path: _Sum(width) for path, width in widths.items()}
        with model.block(index):
            watch = {path: entry.add for path, entry in found.items()}
            states.hidden = model.run_block(index, states, watch=watch)
        counts = team.gather({path: entry.tokens for path, entry in found.items()})
        for path, entry in found.items():
            team.add_([entry.total])
            entry.tokens = sum(count[path] for count in counts)
            name = prefix + path
            sums[name], tokens[name] = entry.result(name), entry.tokens
    return InputSquares(sums, tokens, tuple(sources), *windows.shape)


class _Sum:
    """Squares of the inputs of one layer, summed over tokens."""

    def __init__(self, columns: int) -> None:
        self.tokens = 0
        self.total = torch.zeros(columns, dtype=torch.float64)

    def add(self, inputs: Tensor) -> None:
        """Count inputs ``[..., C]`` of one call."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        # float64 over all tokens: the sum is then the same in any order.
        self.total += flat.square().sum(0, dtype=torch.float64).cpu()
        self.tokens += len(flat)

    def result(self, layer: str) -> Tensor:
        """Return float32 ``[C]``."""
        if not bool(self.total.isfinite().all()):
            raise CalibrationError(
                f"inputs of {layer} are NaN or infinite; the checkpoint is damaged, or "
                "its activations do not fit the arithmetic"
            )
        return self.total.float()
