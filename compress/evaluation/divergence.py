"""How far a compressed model is from its base, token by token.

For every counted position, with p the base's and q the candidate's next-token
distribution and t the true token: KL = sum p log(p/q) in nats; top-1 agreement
[argmax p = argmax q]; flips, [argmax p = t] != [argmax q = t]; dp = q_t - p_t.
Softmax in float32, sums in float64, whatever the models' dtype.

Standard errors come from the means of windows, since positions inside a window are not
independent.

Source: Dutta et al. (2024), "Accuracy is not all you need", for flips and KL; the
quantities match ``llama-perplexity --kl-divergence``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.core.errors import CompressError
from compress.evaluation.perplexity import TokenWindows
from compress.model.devices import numbers_at_once

_QUANTILES = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}
_HISTOGRAM_EDGES = tuple(10.0 ** (e / 2) for e in range(-14, 5))


@dataclass(frozen=True)
class Scores:
    """Per-position figures of one model on one text, each float64 ``[N, P]``.

    Attributes:
        protocol: Name of the perplexity protocol.
        nll: Negative log-likelihood of the true token, in nats.
        kl: To the base; ``None`` for the base itself.
        same_top: Whether the most likely token is the base's.
        flipped: Whether exactly one of the two predicts the true token.
        dp: Probability of the true token minus the base's.
    """

    protocol: str
    nll: Tensor
    kl: Tensor | None = None
    same_top: Tensor | None = None
    flipped: Tensor | None = None
    dp: Tensor | None = None


def compare(
    windows: TokenWindows,
    base: Iterable[Tensor],
    candidate: Iterable[Tensor] | None = None,
) -> tuple[Scores, Scores | None]:
    """Score a base, and a candidate against it; see :func:`compare_many`."""
    named = {} if candidate is None else {"candidate": candidate}
    own, others = compare_many(windows, base, named)
    return own, others.get("candidate")


def compare_many(
    windows: TokenWindows,
    base: Iterable[Tensor],
    candidates: Mapping[str, Iterable[Tensor]],
) -> tuple[Scores, dict[str, Scores]]:
    """Score a base, and any number of candidates against it, window by window.

    Args:
        windows: The text.
        base: float32 logits ``[T, V]`` for each window; scored where they are.
        candidates: The same of each candidate, by name; a window of each is held, on
            the host if there are several.

    Returns:
        Scores of the base, and of each candidate.

    Raises:
        CompressError: Logits are not finite, or vocabularies differ.
    """
    base_nll: list[Tensor] = []
    rows: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in candidates}
    streams: Iterable[tuple[Tensor, ...]] = [()] * len(windows.ids)
    if candidates:
        given = candidates.values()
        waiting = given if len(given) == 1 else [map(Tensor.cpu, q) for q in given]
        streams = zip(*waiting, strict=True)
    for ids, p, qs in zip(windows.ids, base, streams, strict=True):
        nll, columns = _window(p, qs, ids, windows.first)
        base_nll.append(nll)
        for name, found in zip(rows, columns, strict=True):
            rows[name].append(found)
    own = Scores(windows.protocol, torch.stack(base_nll))
    return own, {
        name: Scores(
            windows.protocol,
            *(torch.stack(column) for column in zip(*table, strict=True)),
        )
        for name, table in rows.items()
    }


def _finite(logits: Tensor, who: str) -> None:
    ends = torch.stack(torch.aminmax(logits))  # NaN passes through
    if not bool(torch.isfinite(ends).all()):
        raise CompressError(f"the {who} model yields NaN or infinite logits")


def _window(
    p: Tensor, qs: Sequence[Tensor], ids: Tensor, first: int
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Return the base's NLL on one window, and the columns of each candidate.

    What is the base's own is computed once, however many candidates there are. All of
    it happens where the base's logits are; scores come to the CPU.
    """
    _finite(p, "base")
    for q in qs:
        if p.shape != q.shape:
            raise CompressError(
                f"the models' logits differ in shape: base {tuple(p.shape)}, "
                f"compressed {tuple(q.shape)}; they must share one vocabulary"
            )
        _finite(q, "compressed")
    nll: list[Tensor] = []
    parts: list[list[tuple[Tensor, ...]]] = [[] for _ in qs]
    targets = ids[first + 1 :].to(p.device)
    most = max(1, numbers_at_once(p.device.type) // p.shape[1])
    for start in range(first, len(ids) - 1, most):
        stop = min(start + most, len(ids) - 1)
        true = targets[start - first : stop - first, None]
        logp = torch.log_softmax(p[start:stop].float(), -1)
        lp = logp.gather(1, true)[:, 0].double()
        nll.append(-lp)
        if qs:
            mass, top_p = logp.exp(), logp.argmax(-1)
        for part, q in zip(parts, qs, strict=True):
            logq = torch.log_softmax(q[start:stop].to(p.device).float(), -1)
            terms = torch.sub(logp, logq).mul_(mass)
            kl = terms.sum(-1, dtype=torch.float64).clamp(min=0)
            top_q = logq.argmax(-1)
            hit_p, hit_q = top_p == true[:, 0], top_q == true[:, 0]
            lq = logq.gather(1, true)[:, 0].double()
            columns = (-lq, kl, top_p == top_q, hit_p != hit_q, lq.exp() - lp.exp())
            part.append(tuple(column.double() for column in columns))
    return torch.cat(nll).cpu(), [
        tuple(torch.cat(column).cpu() for column in zip(*part, strict=True))
        for part in parts
    ]


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of ``[N, P]`` and its standard error over the ``N`` windows."""
    means = values.mean(1)
    count = len(means)
    error = float(means.std()) / math.sqrt(count) if count > 1 else math.nan
    return float(values.mean()), error


def summarize(
    scores: Scores, *, base: Scores | None, text_bytes: int
) -> dict[str, Any]:
    """Return the figures of a report for one text.

    Args:
        scores: Of the model.
        base: Of the base model, when ``scores`` is a candidate's.
        text_bytes: UTF-8 bytes of the counted tokens, for bits per byte.
    """
    nll, nll_error = mean_and_error(scores.nll)
    perplexity = math.exp(nll)
    figures: dict[str, Any] = {
        "protocol": scores.protocol,
        "tokens": scores.nll.numel(),
        "perplexity": perplexity,
        "perplexity_se": perplexity * nll_error,
        "bits_per_byte": float(scores.nll.sum()) / (math.log(2) * text_bytes),
    }
    if base is None or scores.kl is None:
        return figures
    assert scores.same_top is not None and scores.flipped is not None
    assert scores.dp is not None
    ratio, ratio_error = mean_and_error(scores.nll - base.nll)
    kl, kl_error = mean_and_error(scores.kl)
    top, top_error = mean_and_error(scores.same_top)
    flat = scores.kl.flatten()
    ordered = flat.sort().values
    last = len(ordered) - 1
    figures |= {
        "ppl_ratio": math.exp(ratio),
        "ppl_ratio_se": math.exp(ratio) * ratio_error,
        "kl": kl,
        "kl_se": kl_error,
        **{f"kl_{k}": float(ordered[round(q * last)]) for k, q in _QUANTILES.items()},
        "kl_max": float(ordered[last]),
        "kl_histogram": _histogram(flat),
        "top1": top,
        "top1_se": top_error,
        "flips": float(scores.flipped.mean()),
        "dp_rms": float(scores.dp.square().mean().sqrt()),
    }
    return figures


def _histogram(kl: Tensor) -> dict[str, list[float]]:
    """Count positions by half decades of KL; the outer bins are open."""
    edges = torch.tensor(_HISTOGRAM_EDGES, dtype=kl.dtype)
    places = torch.bucketize(kl, edges).clamp(1, len(edges) - 1) - 1
    counts = torch.bincount(places, minlength=len(edges) - 1)
    return {"edges": list(_HISTOGRAM_EDGES), "counts": [int(c) for c in counts]}
