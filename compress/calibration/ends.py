"""Statistics of the two ends of a model: what embedding and head are judged by.

The head's input is the last hidden state behind the final norm. An embedding is looked
up, so that errors of all its columns count alike: its second moment is the identity. A
tied matrix is both, and gets the head's moments with a share of their mean added along
the diagonal; and since it is coded before any block, it has to be the dense model's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from compress.calibration.collect import Moments
from compress.core.statistics import LayerStatistics
from compress.model.states import Activations
from compress.model.streaming import StreamedModel

_LOOKED_UP = 0.1
"""Weight of the look-up in a tied matrix, as a share of the mean of ``diag(H)``."""


def embedding_statistics(columns: int, tokens: int, device: str) -> LayerStatistics:
    """Return the statistics of an embedding ``[V, C]`` that is only looked up.

    Args:
        columns: Width of a row.
        tokens: Of the calibration text.
        device: Where the identity is to lie.
    """
    return LayerStatistics(2 * tokens * torch.eye(columns, device=device), tokens)


@torch.no_grad()
def head_statistics(
    model: StreamedModel, states: Activations, dense: Activations | None = None
) -> LayerStatistics:
    """Return the statistics of the head's inputs.

    Args:
        model: Has the final norm.
        states: Outputs of the last block.
        dense: Those of the dense model, where drift is wanted.
    """
    moments = Moments()
    streams = [states] if dense is None else [states, dense]
    with model.final_norm() as norm:
        for batch in model.feed(model.batches(states), *streams):
            moments.add(*(norm(hidden) for hidden in batch))
    return moments.statistics(model.description.family.head)


@torch.no_grad()
def tied_statistics(model: StreamedModel, windows: Tensor) -> LayerStatistics:
    """Run the dense model; return statistics of a matrix that is both ends.

    Args:
        model: Dense.
        windows: int64 ``[N, T]`` calibration tokens.
    """
    states = model.embed(windows)
    indices = range(model.description.block_count)
    for index in tqdm(indices, desc="head", unit="block", leave=False, disable=None):
        with model.block(index):
            model.advance(index, states)
    return looked_up_too(head_statistics(model, states))


def looked_up_too(head: LayerStatistics) -> LayerStatistics:
    """Return the statistics of a tied matrix from those of the head alone."""
    hessian = head.hessian.clone()
    hessian.diagonal().add_(_LOOKED_UP * hessian.diagonal().mean())
    return LayerStatistics(hessian, head.tokens)
