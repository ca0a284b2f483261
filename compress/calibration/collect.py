"""Second moments of the inputs of a block's linears, measured while the block runs.

Calibration and quantization share one forward pass of a block: when the first of the
layers that share an input is about to run, its input for *all* windows is at hand, so
statistics are complete, the layers are quantized there and then, and the pass goes on
with their new weights. Each layer thus sees what the compressed layers before it feed
it ("true sequential" order) for the price of a single pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from compress.core.errors import CalibrationError
from compress.core.families import Linear
from compress.core.statistics import LayerStatistics

_COLUMN_BLOCKS = 4


def gram(inputs: Tensor) -> Tensor:
    """Return ``2 X^T X`` for ``X`` float32 ``[T, C]``, computing each pair once."""
    columns = inputs.shape[1]
    width = -(-columns // _COLUMN_BLOCKS)
    result = torch.empty(columns, columns, device=inputs.device)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        part = inputs[:, start:].T @ inputs[:, start:stop]
        result[start:, start:stop] = part
        result[start:stop, start:] = part.T
    return result.mul_(2)


def measure(inputs: Tensor, dense: Tensor | None, layer: str) -> LayerStatistics:
    """Return the statistics of one layer input.

    Args:
        inputs: ``[N, T, C]``, what the layer sees in the partly compressed model.
        dense: The same in the dense model, or ``None``.
        layer: Name for messages.

    Raises:
        CalibrationError: The inputs are not finite.
    """
    flat = inputs.reshape(-1, inputs.shape[-1]).float()
    hessian = gram(flat)
    drift = None
    if dense is not None:
        moved = dense.reshape(flat.shape).to(flat) - flat
        drift = (moved.T @ flat).mul_(2)
    # One bad activation makes a whole row of the sum bad, which is cheaper to look for.
    if not bool(torch.isfinite(hessian if drift is None else hessian + drift).all()):
        raise CalibrationError(
            f"inputs of {layer} are NaN or infinite; the checkpoint is damaged, or its "
            "activations do not fit the arithmetic"
        )
    return LayerStatistics(hessian, flat.shape[0], drift)


def first_arrivals(
    linears: Sequence[Linear], arrive: Callable[[str, Tensor], None]
) -> Mapping[str, Callable[[Tensor], None]]:
    """Return hooks that call ``arrive(input_name, tensor)`` once for each shared input.

    Args:
        linears: Layers of a block.
        arrive: Called with the input's name before any layer that reads it runs.
    """
    seen: set[str] = set()

    def hook(name: str) -> Callable[[Tensor], None]:
        def handle(inputs: Tensor) -> None:
            if name not in seen:
                seen.add(name)
                arrive(name, inputs)

        return handle

    return {linear.path: hook(linear.input) for linear in linears}
