"""Neurons that stay, exchanged for ones that went, by the KL of the repaired model.

A score says what a neuron is worth in the dense model. Here the question is asked of
the model as it will be: neurons gone, ``down`` repaired. With ``x`` the input of a
``down``, S what stays and P what goes, any neuron's share of the output that no repair
brings back is linear in a number of its own:

    y(d) = W' x_S + W'' (d * r),    r_j = x_j - E[x_j | x_S without j]

``r`` is what the neurons that stay do not predict (for one that stays: the others),
``W''`` has the repaired columns of S; a column of P also does what the others of P
have in common with its ``r``. ``d = 0`` is the pruned model, ``d_j = 1`` brings j of P
back, ``d_j = -1`` takes j of S away, each with the repair that follows. The KL to the
dense model changes, to second order, by

    take away: -g_j + h_j / 2        bring back: g_j + h_j / 2

with ``g`` its gradient and ``h`` the diagonal of the Fisher matrix (labels drawn from
the pruned model; products of two tokens left out). A round takes the cheapest away and
brings the most useful back, as many as a cap that falls from round to round allows, and
is undone if the KL on fresh text did not fall; then the cap is halved.

Source: ours. The one-neuron losses are those of optimal brain surgeon (Hassibi & Stork,
1993) with the KL of the whole model instead of one matrix's error, and move both ways.

Limits: the dense model, and three matrices for each ``down``, ``[I, I]`` among them,
are in memory on the device. Exchanges at one time are taken as independent, so that
together they bring less than is predicted of each. Little text is learned by heart:
several hundred thousand tokens should be there. No mixtures of experts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.core.compensation import complement, factor
from compress.core.errors import CalibrationError
from compress.pruning.places import MLPPlace
from compress.recovery.losses import linear_ce, linear_kl
from compress.recovery.models import WholeModel
from compress.recovery.text import Order

TOKENS = 1 << 17
"""Of a round."""
AT_ONCE = 8192
"""Tokens of one backward pass."""
SHARE = 0.01
"""Of all neurons, exchanged in the first round at most; it falls linearly."""
_log = logging.getLogger(__name__)


class StandIn:
    """What computes instead of one ``down``, and sees what each neuron does.

    Attributes:
        slope: float32 ``[I]``, the gradient to ``d`` since :meth:`forget`.
        curvature: float32 ``[I]``, the sum over tokens of its square, likewise.

    Args:
        layer: Dense, ``[H, I]``.
        gram: float32 ``[I, I]``, second moment of its inputs; ``None`` if nothing is
            repaired.
    """

    def __init__(self, layer: Any, gram: Tensor | None) -> None:
        self._weight: Tensor = layer.weight.detach()
        self._bias: Tensor | None = layer.bias
        self._gram = gram
        self._now: list[int] = []
        self.forget()

    def forget(self) -> None:
        """Begin to count anew."""
        zeros = self._weight.new_zeros(self._weight.shape[1], dtype=torch.float32)
        self.slope, self.curvature = zeros, zeros.clone()

    def keep_(self, neurons: Sequence[int]) -> None:
        """Let these stay, ascending, and repair them; for the same ones nothing."""
        if self._now == list(neurons):
            return
        self._now = list(neurons)
        device, dtype = self._weight.device, self._weight.dtype
        kept = torch.tensor(self._now, device=device)
        gone = complement(kept, self._weight.shape[1])
        wide = self._weight.double()
        own = torch.zeros_like(wide)
        own[:, kept] = wide[:, kept]
        both, unpredicted = wide.clone(), None
        if self._gram is not None:
            gram = self._gram.to(device)
            damped, lower = factor(gram[kept][:, kept])
            inverse = torch.cholesky_inverse(lower)
            predicted = gram[gone][:, kept].double() @ inverse
            own[:, kept] += wide[:, gone] @ predicted
            unpredicted = torch.eye(len(gram), dtype=torch.float64, device=device)
            scale = inverse.diagonal()[:, None]
            unpredicted[kept[:, None], kept] = inverse / scale
            unpredicted[gone[:, None], kept] = -predicted
            unpredicted = unpredicted.to(dtype)
            # One that comes back stands for what it tells of the others that went, too.
            left = gram[gone][:, gone] - predicted @ gram[kept][:, gone].double()
            left.diagonal().add_((damped - gram[kept][:, kept]).diagonal().mean())
            both[:, gone] = wide[:, gone] @ (left / left.diagonal())
        both[:, kept] = own[:, kept]
        self._own, self._both = own.to(dtype), both.to(dtype)
        self._unpredicted = unpredicted

    def output(self, x: Tensor) -> Tensor:
        """Return the repaired output ``[..., H]`` for dense inputs ``[..., I]``."""
        return nn.functional.linear(x, self._own, self._bias)

    def observe(self, x: Tensor, slopes: Tensor) -> Tensor:
        """Count gradients at the output, and return those at the input."""
        slopes = slopes.to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        if self._unpredicted is not None:
            flat = flat @ self._unpredicted.T
        effect = (flat * (slopes.reshape(len(flat), -1) @ self._both)).float()
        self.slope += effect.sum(0)
        self.curvature += effect.square_().sum(0)
        return slopes @ self._own


class _Observed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stand_in: StandIn) -> Tensor:
        ctx.save_for_backward(x)
        ctx.stand_in = stand_in
        return stand_in.output(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.stand_in.observe(x, slopes[0]), None


@dataclass(frozen=True)
class Measured:
    """What a pruned model does on some text.

    Attributes:
        loss: KL to the dense model, nats a token.
        away: What taking a neuron away adds to it, ``[I_l]`` for each block.
        back: What bringing one back adds to it; most are below zero.
    """

    loss: float
    away: list[Tensor]
    back: list[Tensor]


class Exchange:
    """Exchanges neurons of a model round by round.

    Args:
        model: Dense; its blocks recompute their activations from now on.
        windows: int64 ``[N, T]`` tokens.
        places: The MLP of each block.
        grams: Second moments of their inputs, or ``None`` each without a repair.
        protected: Neurons of each block that stay.
        floors: How many each block keeps at least.
        rounds: How many there will be.
        within: Whether each block keeps its number.
        seed: Of the order of windows and of labels.
    """

    def __init__(
        self,
        model: WholeModel,
        windows: Tensor,
        places: Sequence[MLPPlace],
        grams: Sequence[Tensor | None],
        *,
        protected: Sequence[Tensor],
        floors: Sequence[int],
        rounds: int,
        within: bool,
        seed: int = 0,
    ) -> None:
        self._model, self._windows = model, windows
        self._protected, self._floors = protected, floors
        self._rounds, self._within, self._seed = rounds, within, seed
        self._layers = [
            model.blocks[place.block].get_submodule(place.down_path) for place in places
        ]
        self._sizes = [place.neurons for place in places]
        self._stands = [
            StandIn(layer, gram)
            for layer, gram in zip(self._layers, grams, strict=True)
        ]
        batch = min(len(windows), max(1, TOKENS // windows.shape[1]))
        self._order = Order(len(windows), batch, seed)
        self._known: tuple[int, list[list[int]], Measured] | None = None
        model.checkpoint_blocks()
        model.embedding.register_forward_hook(_with_gradient)

    def round(
        self, number: int, kept: Sequence[Sequence[int]], halvings: int
    ) -> dict[str, Any]:
        """Return what a round makes of the neurons that stay, as plain data.

        Args:
            number: From 0 on.
            kept: Indices for each block, ascending.
            halvings: How often the cap was halved before.
        """
        now = [list(block) for block in kept]
        found = self.measured(number, now)
        cap = SHARE * (1 - number / self._rounds) / 2**halvings
        trial, count = self._trial(now, found, cap)
        before = self._loss(number + 1, now)
        after = self.measured(number + 1, trial)
        better = after.loss < before
        if not better:
            self._known = None
        fell = f"KL {before:.4f} -> {after.loss:.4f}{'' if better else ', undone'}"
        _log.info("exchange %d: %d neurons, %s", number + 1, count, fell)
        return {
            "kept": trial if better else now,
            "halvings": halvings + (not better),
            "neurons": count if better else 0,
            "before": before,
            "after": after.loss if better else before,
        }

    def fitted(
        self, kept: Sequence[Sequence[int]], widths: Sequence[int]
    ) -> list[list[int]]:
        """Return the neurons that stay if each block is to have another width."""
        if [len(block) for block in kept] == list(widths):
            return [list(block) for block in kept]
        found = self.measured(self._rounds, [list(block) for block in kept])
        result = []
        for block, (own, width) in enumerate(zip(kept, widths, strict=True)):
            away, back = found.away[block], found.back[block]
            worth = -back  # of what went; all that stays comes before
            inside = torch.tensor(own)
            worth[inside] = away[inside] + worth.abs().max() + away.abs().max() + 1
            worth[self._protected[block]] = torch.inf
            order = worth.sort(descending=True, stable=True).indices
            result.append(order[:width].sort().values.tolist())
        return result

    def measured(self, number: int, kept: list[list[int]]) -> Measured:
        """Return what a choice costs on the text of a round."""
        if self._known is not None and self._known[:2] == (number, kept):
            return self._known[2]
        rows = self._rows(number)
        labels = torch.Generator(self._model.device)
        labels.manual_seed(self._seed * 1_000_003 + number)
        with self._standing(kept):
            loss = self._backward(rows, lambda ids: self._share(ids, rows))
            slopes = [stand.slope.cpu() for stand in self._stands]
            _check_finite(slopes)
            for stand in self._stands:
                stand.forget()
            self._backward(rows, lambda ids: self._drawn(ids, labels))
            curved = [stand.curvature.cpu() / rows.numel() for stand in self._stands]
        pairs = list(zip(slopes, curved, strict=True))
        away = [-slope + curve / 2 for slope, curve in pairs]
        back = [slope + curve / 2 for slope, curve in pairs]
        found = Measured(loss, away, back)
        self._known = number, kept, found
        return found

    def _rows(self, number: int) -> Tensor:
        return self._windows[self._order.rows(number)].to(self._model.device)

    def _loss(self, number: int, kept: list[list[int]]) -> float:
        rows = self._rows(number)
        with self._standing(kept), torch.no_grad():
            return sum(float(self._share(part, rows)) for part in self._parts(rows))

    def _parts(self, rows: Tensor) -> Sequence[Tensor]:
        return torch.split(rows, max(1, AT_ONCE // rows.shape[1]))

    def _backward(self, rows: Tensor, loss: Callable[[Tensor], Tensor]) -> float:
        """Go back through a loss of each part, and return their sum."""
        total = 0.0
        for part in self._parts(rows):
            own = loss(part)
            own.backward()  # type: ignore[no-untyped-call]
            total += float(own.detach())
        return total

    def _share(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Return what some windows add to the mean KL of all rows."""
        with self._dense(), torch.no_grad():
            dense = self._model.states(ids)
        head = self._model.head
        mean = linear_kl(self._model.states(ids), head, dense, head)
        return mean * (len(ids) / len(rows))

    def _drawn(self, ids: Tensor, labels: torch.Generator) -> Tensor:
        """Return the sum of -log p of tokens that are drawn from the model."""
        states = self._model.states(ids).flatten(0, 1)
        head = self._model.head
        with torch.no_grad():
            drawn = [
                torch.multinomial(head.logits(part).softmax(-1), 1, generator=labels)
                for part in torch.split(states.detach(), 1024)
            ]
        targets = torch.cat(drawn)[:, 0]
        return linear_ce(states, head, targets) * len(targets)

    @contextmanager
    def _standing(self, kept: Sequence[Sequence[int]]) -> Iterator[None]:
        """Let the stand-ins compute for a while."""
        for stand, own in zip(self._stands, kept, strict=True):
            stand.forget()
            stand.keep_(own)
        self._stand_in()
        try:
            yield
        finally:
            self._stand_back()

    @contextmanager
    def _dense(self) -> Iterator[None]:
        self._stand_back()
        try:
            yield
        finally:
            self._stand_in()

    def _stand_in(self) -> None:
        for layer, stand in zip(self._layers, self._stands, strict=True):
            layer.forward = _Through(stand)

    def _stand_back(self) -> None:
        for layer in self._layers:
            layer.__dict__.pop("forward", None)

    def _trial(
        self, kept: list[list[int]], found: Measured, cap: float
    ) -> tuple[list[list[int]], int]:
        """Return the next choice, and how many neurons it exchanges."""
        away, back, stays_in = [], [], []
        for block, own in enumerate(kept):
            inside = torch.zeros(self._sizes[block], dtype=torch.bool)
            inside[own] = True
            cost = found.away[block].masked_fill(~inside, torch.inf)
            cost[self._protected[block]] = torch.inf
            spare = 0 if self._within else max(0, len(own) - self._floors[block])
            if not self._within:  # no block falls below its floor
                cost[cost.sort(stable=True).indices[spare:]] = torch.inf
            stays_in.append(inside)
            away.append(cost)
            back.append(found.back[block].masked_fill(inside, torch.inf))
        flat = torch.cat([torch.full((n,), b) for b, n in enumerate(self._sizes)])
        groups = range(len(kept)) if self._within else [None]
        costs, gains, stays = torch.cat(away), torch.cat(back), torch.cat(stays_in)
        count = 0
        for group in groups:
            places = torch.arange(len(flat))
            if group is not None:
                places = places[flat == group]
            most = max(1, int(cap * len(places)))
            out = places[costs[places].sort(stable=True).indices[:most]]
            into = places[gains[places].sort(stable=True).indices[:most]]
            worth = costs[out] + gains[into] < 0
            stays[out[worth]], stays[into[worth]] = False, True
            count += int(worth.sum())
        parts = torch.split(stays, self._sizes)
        return [torch.nonzero(part).flatten().tolist() for part in parts], count


def _check_finite(slopes: Sequence[Tensor]) -> None:
    for block, slope in enumerate(slopes):
        if not bool(slope.isfinite().all()):
            raise CalibrationError(
                f"prune.exchanges: a gradient in block {block} is NaN or infinite; set "
                "calibration.dtype: float32"
            )


class _Through:
    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = _Observed.apply(x, self._stand_in)  # type: ignore[no-untyped-call]
        return found


def _with_gradient(_module: nn.Module, _inputs: Any, states: Tensor) -> Tensor:
    """Let gradients flow through blocks whose weights are frozen."""
    return states.requires_grad_() if torch.is_grad_enabled() else states
