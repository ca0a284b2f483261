"""Recorded loops: what needs no GPU. ``tests/gpu/test_replay.py`` has the rest."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor

from compress.core import replay


def step(about: float, x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
    return (x * about if y is None else x * about + y,)


def recording(numbers: int) -> replay._Recording:
    return replay._Recording(None, [torch.zeros(numbers)], (torch.zeros(numbers),))


def test_on_a_cpu_the_step_is_called() -> None:
    x, y = torch.arange(3.0), torch.ones(3)
    for _ in range(3):
        (found,) = replay.run(step, 2.0, (x, y))
        assert torch.equal(found, 2 * x + 1)
    (found,) = replay.run(step, 2.0, (x, None))
    assert torch.equal(found, 2 * x)
    assert not replay._recordings


def test_what_was_used_last_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: OrderedDict[str, replay._Recording | None] = OrderedDict()
    kept |= {"old": recording(100), "seen once": None}
    kept |= {"middle": recording(50), "new": recording(50)}
    monkeypatch.setattr(replay, "_recordings", kept)
    monkeypatch.setattr(replay, "_KEPT_BYTES", 2 * 100 * 4)
    replay._drop_oldest()
    assert list(kept) == ["seen once", "middle", "new"]
    monkeypatch.setattr(replay, "_KEPT_BYTES", 0)
    replay._drop_oldest()
    assert list(kept) == ["seen once", "new"]  # however large it is
    replay.forget()
    assert not kept
