"""Tunes all coded layers of a block together, before the next block is begun.

Layers are coded one by one, each on its own inputs. Afterwards scales and tables are
trained, codes fixed, so that the block's output on the inputs that it will see is that
of the dense block on the same inputs. Epochs are judged by what will be stored, rounded
to its type, on every eighth window, which is not trained on; the best one is kept, and
that may be the start.

Source: Egiazarian et al. (2024), "Extreme Compression of Large Language Models via
Additive Quantization", arXiv 2401.06118, section 3.4. Differs: norms are not trained,
since only coded matrices are stored; learning rates are relative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.core.continuous import BlockTuning, Continuous, is_tunable
from compress.core.tensors import QuantizedTensor
from compress.distributed.codes import from_first
from compress.distributed.team import Team
from compress.model.states import Activations
from compress.model.streaming import StreamedModel

Forward = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""From inputs ``[B, T, C]`` and weights by path to the block's outputs."""
Windows = Callable[[Sequence[int]], tuple[Tensor, Tensor]]
"""Returns inputs and wanted outputs ``[B, T, C]`` of windows, on the device."""

_HELD_OUT = 8  # one of so many
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class _Task:
    """A block that is to be tuned.

    Attributes:
        forward: Runs it.
        windows: Its inputs and wanted outputs.
        batch: Windows of a step.
    """

    forward: Forward
    windows: Windows
    batch: int

    def loss(self, rows: Sequence[int], weights: Mapping[str, Tensor]) -> Tensor:
        """Return the relative squared error of some windows."""
        inputs, wanted = self.windows(rows)
        gap = self.forward(inputs, weights).float() - wanted.float()
        size = (wanted - inputs).float()  # without what the residual passes through
        return gap.square().sum() / size.square().sum().clamp(min=1e-30)

    @torch.no_grad()
    def judged(
        self, rows: Sequence[int], coded: Mapping[str, QuantizedTensor]
    ) -> float:
        """Return the mean loss of windows with the values that will be stored."""
        weights = {path: tensor.dequantize() for path, tensor in coded.items()}
        parts = [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]
        losses = [self.loss(part, weights) * len(part) for part in parts]
        return float(torch.stack(losses).sum()) / len(rows)


def tune_jointly(
    coded: Mapping[str, QuantizedTensor],
    model: StreamedModel,
    index: int,
    *,
    ends: tuple[Activations, Activations],
    tuning: BlockTuning,
    team: Team,
) -> dict[str, QuantizedTensor]:
    """Return the coded layers of a block, tuned on the windows of all processes.

    The first process does it, and needs memory for all states; the others wait.

    Args:
        coded: By path inside the block.
        model: Has the block loaded.
        index: Of the block.
        ends: Inputs and wanted outputs, for this process's share of the windows.
        tuning: How.
        team: The processes.
    """
    calls = ends[0].calls
    rows = [team.rows_at_first(states.hidden) for states in ends]
    whole = [Activations(x, calls) for x in rows if x is not None]
    found: dict[str, QuantizedTensor] = {}
    if whole:
        found = tune_block(
            coded,
            lambda hidden, weights: model.call_block(
                index, hidden, calls[index], weights=weights
            ),
            lambda chosen: (
                model.windows(whole[0], chosen),
                model.windows(whole[1], chosen),
            ),
            shape=(whole[0].hidden.shape[0], whole[0].hidden.shape[1]),
            tuning=tuning,
        )
    return from_first(team, found, model.device)


def tune_block(
    coded: Mapping[str, QuantizedTensor],
    forward: Forward,
    windows: Windows,
    *,
    shape: tuple[int, int],
    tuning: BlockTuning,
) -> dict[str, QuantizedTensor]:
    """Return the coded layers of a block with better scales and tables.

    Args:
        coded: By path inside the block; what has no continuous part is not changed.
        forward: Runs the block with other weights.
        windows: Inputs and wanted outputs.
        shape: How many windows there are, and their length in tokens.
        tuning: How.

    Returns:
        All of ``coded``; those that were tuned have a note with the block's error
        before and after.
    """
    count, length = shape
    every = range(count)
    held = [i for i in every if i % _HELD_OUT == _HELD_OUT - 1] or [count - 1]
    used = [i for i in every if i not in held]
    parts = {path: Continuous(x) for path, x in coded.items() if is_tunable(x)}
    if not parts or not used:
        return dict(coded)
    task = _Task(forward, windows, max(1, tuning.step_tokens // length))
    fixed = {path: x.dequantize() for path, x in coded.items() if path not in parts}
    leaves = [leaf for part in parts.values() for leaf in part.leaves]
    optimizer = torch.optim.Adam(
        [
            {"params": [leaf], "lr": tuning.learning_rate * _size(leaf)}
            for leaf in leaves
        ],
        betas=_BETAS,
    )
    generator = torch.Generator().manual_seed(tuning.seed)
    best, waited = dict(coded), 0
    first = least = task.judged(held, best)
    for _ in range(tuning.epochs):
        order = [used[i] for i in torch.randperm(len(used), generator=generator)]
        for start in range(0, len(order), task.batch):
            with torch.enable_grad():
                weights = {path: part.values() for path, part in parts.items()}
                loss = task.loss(order[start : start + task.batch], fixed | weights)
            optimizer.zero_grad()
            loss.backward(inputs=leaves)  # type: ignore[no-untyped-call]
            optimizer.step()
        stored = dict(coded) | {path: part.stored() for path, part in parts.items()}
        now = task.judged(held, stored)
        if now < least:
            best, least, waited = stored, now, 0
        else:
            waited += 1
            if waited == tuning.patience:
                break
    note = f"tuned with its block: error of the output {first:.4g} before, {least:.4g}"
    return {
        path: replace(x, notes=(*x.notes, note)) if path in parts else x
        for path, x in best.items()
    }


def _size(leaf: Tensor) -> float:
    """Return the root mean square of a tensor."""
    return float(leaf.detach().square().mean().sqrt()) or 1.0
