"""Widths of blocks, learned: one threshold for each, by gradients of the KL.

A pruner's scores become ranks ``r`` in (0, 1) within each block. A block has one
threshold ``theta_l``, and the input of its ``down`` is multiplied by

    m = sigmoid((r - theta_l) / tau),    tau: 0.1 -> 0.01

In the second half of the steps the mask is ``r > theta_l`` and only its gradient is
that of the sigmoid. What is learned are these L numbers, by Adam, on

    KL(dense || masked) + lambda c + mu / 2 c^2,    c = sum_l I_l mean(m_l) / kept - 1

an augmented Lagrangian: ``lambda`` starts as the least-squares estimate of the
multiplier and ``mu`` as a multiple of it, so that neither depends on the model. Adam's
``eps`` is the size of the first gradients of the KL: where they cancel against the
constraint's, as they do in the end, what is left is noise, and steps have to shrink.

Source: Zhai et al., LAPP (arXiv 2309.14157), for learned thresholds on ranked filters
with a constraint. What differs: no bypass around a pruned layer (the residual stream is
one) and a floor of a quarter of each block, which is what the paper's bypass is for;
ranks instead of scores; the network stays as it is.

Limits: the dense model is in memory as a whole, on the device, beside one block's
activations; it is the model without the blocks that were dropped before. Masked neurons
are zero, while the repair that follows makes up for some of what they did; and they go
by score alone, where ``comp`` chooses chunk by chunk. The same seed gives the same
thresholds where the backward pass of attention does, which some GPU kernels do not.
Mixtures of experts have one width for all blocks, so that there is nothing to learn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.core.errors import CalibrationError
from compress.progress import progress_bar
from compress.pruning.budgets import FLOOR
from compress.pruning.places import mlp_places
from compress.recovery.losses import linear_kl
from compress.recovery.models import WholeModel
from compress.recovery.text import Order

STEPS = 120
"""On a small trained model 60 steps ended up to 1 % off the budget; 120 ended within
0.3 %, and at the shares of 240 to 0.01."""

TOKENS = 2048  # of a step
_RATE = 0.05  # falls to 0 along a cosine
_TAU = 0.1, 0.01
_STIFFNESS = 50.0  # mu over the first lambda
_GAIN = 0.1  # lambda rises by this times mu c a step


class Gates:
    """A threshold for each block of a model, and the masks that follow from it.

    Attributes:
        thresholds: float32 ``[L]``, what is learned.

    Args:
        model: What is masked inside :meth:`masking`.
        ranks: ``[I_l]`` for each block, as :func:`ranks_of` returns them.
        keep: Share of all neurons.
    """

    def __init__(self, model: WholeModel, ranks: Sequence[Tensor], keep: float) -> None:
        self._model = model
        self._ranks = [r.to(model.device) for r in ranks]
        widths = torch.tensor([len(r) for r in ranks], dtype=torch.float32)
        self._weights = (widths / (keep * widths.sum())).to(model.device)
        self.thresholds = torch.full_like(self._weights, 1 - keep, requires_grad=True)

    def masks(self, tau: float, *, hard: bool) -> list[Tensor]:
        """Return the mask of each block, ``[I_l]``.

        Args:
            tau: Width of the step from 0 to 1, in ranks.
            hard: Whether values are 0 and 1; gradients are the soft mask's anyhow.
        """
        found = []
        for ranks, threshold in zip(self._ranks, self.thresholds, strict=True):
            soft = torch.sigmoid((ranks - threshold) / tau)
            whole = (ranks > threshold).float()
            found.append(whole + (soft - soft.detach()) if hard else soft)
        return found

    def excess(self, masks: Sequence[Tensor]) -> Tensor:
        """Return by how much more than the target is kept, relative to it."""
        kept = torch.stack([mask.mean() for mask in masks])
        return (self._weights * kept).sum() - 1

    def shares(self) -> list[float]:
        """Return the share of its neurons that each block keeps."""
        with torch.no_grad():
            return [float(mask.mean()) for mask in self.masks(1.0, hard=True)]

    @contextmanager
    def masking(self, masks: Sequence[Tensor]) -> Iterator[None]:
        """Multiply the inputs of all ``down`` by masks for a while."""
        hooks = []
        for index, mask in enumerate(masks):
            (place,) = mlp_places(self._model.description, index)
            layer = self._model.blocks[index].get_submodule(place.down_path)
            hooks.append(layer.register_forward_pre_hook(_Multiply(mask)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Multiply:
    def __init__(self, mask: Tensor) -> None:
        self._mask = mask

    def __call__(self, _module: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor]:
        return (given[0] * self._mask.to(given[0].dtype),)


def ranks_of(scores: Tensor, protected: Tensor | None = None) -> Tensor:
    """Return ranks in (0, 1), float32 ``[I]``: the least score has ``1 / 2I``.

    Args:
        scores: ``[I]``. Of equal ones the first has the higher rank, as it is kept.
        protected: Indices that come first, whatever their scores say.
    """
    ordered = scores.double().clone()
    if protected is not None:
        ordered[protected] = torch.inf
    order = ordered.sort(descending=True, stable=True).indices
    count = len(scores)
    values = (torch.arange(count, 0, -1, dtype=torch.float32) - 0.5) / count
    ranks = torch.empty(count, device=scores.device)
    ranks[order] = values.to(scores.device)
    return ranks


def learned_shares(
    model: WholeModel,
    windows: Tensor,
    ranks: Sequence[Tensor],
    keep: float,
    *,
    steps: int,
    seed: int = 0,
) -> list[float]:
    """Return the share of its neurons that each block keeps.

    Args:
        model: Dense; its blocks recompute their activations from now on.
        windows: int64 ``[N, T]`` tokens.
        ranks: ``[I_l]`` for each block.
        keep: Share of all neurons, above :data:`FLOOR` and at most 1.
        steps: Of training; see :data:`STEPS`.
        seed: Of the order of windows.

    Raises:
        CalibrationError: A gradient is not finite.
    """
    windows = windows.to(model.device)
    with torch.no_grad():
        dense = torch.cat([model.states(row[None]) for row in windows])
    model.checkpoint_blocks()
    gates = Gates(model, ranks, keep)
    batch = min(len(windows), max(1, TOKENS // windows.shape[1]))
    order = Order(len(windows), batch, seed)
    optimizer = torch.optim.Adam([gates.thresholds], lr=_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pressure = stiffness = 0.0
    for step in progress_bar(range(steps), desc="gates"):
        tau = _TAU[0] * (_TAU[1] / _TAU[0]) ** (step / steps)
        masks = gates.masks(tau, hard=2 * step >= steps)
        excess = gates.excess(masks)
        (relief,) = torch.autograd.grad(excess, gates.thresholds, retain_graph=True)
        off = float(excess.detach())
        rows = order.rows(step).to(model.device)
        with gates.masking(masks):
            loss = linear_kl(
                model.states(windows[rows]), model.head, dense[rows], model.head
            )
            (rise,) = torch.autograd.grad(loss, gates.thresholds)
        if not bool(rise.isfinite().all()):
            raise CalibrationError(
                f"prune.budgets learned: the gradient of step {step} is NaN or "
                "infinite; set calibration.dtype: float32"
            )
        if step == 0:
            pressure = float(-(rise @ relief) / (relief @ relief))
            stiffness = _STIFFNESS * abs(pressure)
            optimizer.param_groups[0]["eps"] = max(float(rise.abs().mean()), 1e-30)
        force = pressure + stiffness * off
        gates.thresholds.grad = rise + force * relief
        optimizer.step()
        decay.step()
        with torch.no_grad():
            gates.thresholds.clamp_(-5 * _TAU[1], 1 - FLOOR)
        pressure += _GAIN * stiffness * off
    return gates.shares()
