"""Perplexity of a model, and its distance to a base, over several texts in one sweep.

Blocks are read once for as many windows as fit the bound on hidden states, whatever the
texts they belong to, and for base and candidate in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.distributed.team import Team
from compress.evaluation.divergence import Scores, compare_many, summarize
from compress.evaluation.perplexity import (
    TokenWindows,
    cut_windows,
    first_windows,
)
from compress.evaluation.texts import evaluation_text

_HIDDEN_BYTES = 1 << 29
"""Hidden states of one model that are held at once while texts are swept."""


class Predictor(Protocol):
    """Anything that yields logits for windows: a streamed model, or an export."""

    def __call__(self, windows: Tensor) -> Iterable[Tensor]:
        """Yield float32 logits ``[T, V]`` for each window of int64 ``[N, T]``."""


@dataclass(frozen=True)
class PreparedText:
    """A text cut into windows under a protocol.

    Attributes:
        name: Of the text.
        windows: Token ids.
        counted_bytes: UTF-8 bytes of the tokens whose predictions count.
    """

    name: str
    windows: TokenWindows
    counted_bytes: int


def prepare_texts(
    names: Sequence[str],
    tokenizer: Any,
    *,
    protocol: str,
    count: int = 10,
    length: int = 1024,
    most_tokens: int | None = None,
) -> list[PreparedText]:
    """Tokenize and cut texts.

    Args:
        names: Bundled texts or files.
        tokenizer: Of the model.
        protocol: As for :func:`cut_windows`.
        count: Windows at most, for ``windows`` only.
        length: Tokens of a window, for ``windows`` only.
        most_tokens: Windows beyond these are left out, and the name of the protocol
            says so; at least one stays.
    """
    prepared = []
    for name in names:
        text = evaluation_text(name)
        windows = cut_windows(
            text.joined if protocol != "llamacpp512" else text.raw,
            tokenizer,
            protocol=protocol,
            count=count,
            length=length,
            name=name,
        )
        if most_tokens is not None:
            windows = first_windows(windows, most_tokens)
        counted = windows.ids[:, windows.first + 1 :]
        pieces = tokenizer.batch_decode(counted, clean_up_tokenization_spaces=False)
        size = sum(len(piece.encode()) for piece in pieces)
        prepared.append(PreparedText(text.name, windows, size))
    return prepared


def evaluate_texts(
    texts: Sequence[PreparedText],
    base: Predictor,
    candidate: Predictor | None,
    *,
    hidden_size: int,
    kl: bool = True,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return figures by text, of the base and of one candidate.

    See :func:`evaluate_candidates`.
    """
    named = {} if candidate is None else {"candidate": candidate}
    own, others = evaluate_candidates(
        texts, base, named, hidden_size=hidden_size, kl=kl
    )
    return own, others.get("candidate")


def evaluate_candidates(
    texts: Sequence[PreparedText],
    base: Predictor,
    candidates: Mapping[str, Predictor],
    *,
    hidden_size: int,
    kl: bool = True,
    team: Team | None = None,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return figures by text, of the base and of each candidate.

    The base runs once, however many candidates there are.

    Args:
        texts: Of one window length.
        base: The reference.
        candidates: What is compared with it, by name.
        hidden_size: Width of hidden states, which bounds how many windows run at once.
        kl: Report distances too, not only the candidates' perplexity.
        team: The processes that do it together, each on its share of the windows.
    """
    bases, scores = score_candidates(
        texts, base, candidates, hidden_size=hidden_size, team=team
    )
    own: dict[str, Any] = {}
    others: dict[str, dict[str, Any]] = {name: {} for name in candidates}
    for text in texts:
        size = text.counted_bytes
        own[text.name] = summarize(bases[text.name], base=None, text_bytes=size)
        for name, figures in others.items():
            figures[text.name] = summarize(
                scores[name][text.name],
                base=bases[text.name] if kl else None,
                text_bytes=size,
            )
    return own, others


def score_candidates(
    texts: Sequence[PreparedText],
    base: Predictor,
    candidates: Mapping[str, Predictor],
    *,
    hidden_size: int,
    team: Team | None = None,
) -> tuple[dict[str, Scores], dict[str, dict[str, Scores]]]:
    """Return scores by text, of the base and of each candidate.

    The arguments are those of :func:`evaluate_candidates`.
    """
    team = team or Team()
    length = texts[0].windows.ids.shape[1]
    models = max(2, 1 + len(candidates)) / 2  # the bound is of a base and one more
    most = max(1, int(_HIDDEN_BYTES / models) // (length * hidden_size * 4))
    parts: dict[str, list[tuple[Scores, dict[str, Scores]]]] = {
        t.name: [] for t in texts
    }
    for run in _runs([_shared(text, team) for text in texts], most):
        ids = torch.cat([piece.ids for _, piece in run])
        p = iter(base(ids))
        qs = {name: iter(predict(ids)) for name, predict in candidates.items()}
        for name, piece in run:
            n = len(piece.ids)
            mine = {key: _take(q, n) for key, q in qs.items()}
            parts[name].append(compare_many(piece, _take(p, n), mine))
    every = team.gather(parts)
    parts = {text.name: [x for own in every for x in own[text.name]] for text in texts}
    joined = {name: _joined([b for b, _ in pairs]) for name, pairs in parts.items()}
    others = {
        key: {
            name: _joined([scores[key] for _, scores in pairs])
            for name, pairs in parts.items()
        }
        for key in candidates
    }
    return joined, others


def _shared(text: PreparedText, team: Team) -> PreparedText:
    """Return a text with this process's share of its windows; it may have none."""
    ids = team.share(text.windows.ids)
    return replace(text, windows=replace(text.windows, ids=ids))


def _take(logits: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    for _ in range(count):
        yield next(logits)


def _runs(
    texts: Sequence[PreparedText], most: int
) -> Iterator[list[tuple[str, TokenWindows]]]:
    """Split the windows of all texts into runs of at most ``most``."""
    run: list[tuple[str, TokenWindows]] = []
    room = most
    for text in texts:
        start = 0
        while start < len(text.windows.ids):
            ids = text.windows.ids[start : start + room]
            piece = TokenWindows(text.windows.protocol, ids, text.windows.first)
            run.append((text.name, piece))
            start, room = start + len(ids), room - len(ids)
            if room == 0:
                yield run
                run, room = [], most
    if run:
        yield run


def _joined(scores: list[Scores]) -> Scores:
    if len(scores) == 1:
        return scores[0]

    def cat(pick: Callable[[Scores], Tensor | None]) -> Tensor | None:
        values = [value for s in scores if (value := pick(s)) is not None]
        return torch.cat(values) if values else None

    nll = cat(lambda s: s.nll)
    assert nll is not None
    return Scores(
        scores[0].protocol,
        nll,
        cat(lambda s: s.kl),
        cat(lambda s: s.same_top),
        cat(lambda s: s.flipped),
        cat(lambda s: s.dp),
    )


def with_tasks(
    texts: Mapping[str, Any], tasks: Mapping[str, Any]
) -> dict[str, dict[str, Any] | None]:
    """Return headline figures and tasks by model; ``None`` where nothing was measured.

    Args:
        texts: Figures by model and text; of a model that was not measured ``None``.
        tasks: Figures by model and task.
    """
    found: dict[str, dict[str, Any] | None] = {}
    for key, own in texts.items():
        entry = headline(own) if own else None
        if key in tasks:
            entry = {**(entry or {"texts": {}}), "tasks": tasks[key]}
        found[key] = entry
    return found


def headline(texts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of the first text beside those of all."""
    first = next(iter(texts.values()))
    picked = {key: first[key] for key in ("perplexity", "kl", "top1") if key in first}
    return {**picked, "texts": dict(texts)}
