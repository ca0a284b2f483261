"""Random draws that neither follow nor change the state of the caller's generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from compress.core.threads import on_threads


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed Python, numpy and torch, on one thread; put all back afterwards.

    stable-baselines3 draws from the global generators, so a search is the same for the
    same seed only if they are. Networks of this size run no faster on more threads.
    """
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        with on_threads(1):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
