"""Compiled passes: the blocks of a model, and the elementwise part of a loss.

Every layer of a block is a handful of small operations besides its products, each of
which reads and writes all states. ``torch.compile`` fuses them. It compiles once for
each width and shape, all blocks of a kind together; the results differ from those of
plain passes by rounding. What is measured on held-out text runs as it is.

Source: Ansel et al. (2024), "PyTorch 2", ASPLOS 2024.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from compress.core.errors import ConfigError

# Widths that differ from block to block are compiled each; beyond this many kinds of
# one function torch stops with an error, instead of running it as it is.
_MOST_KINDS = 256
_C, _CXX = ("cc", "gcc", "clang"), ("c++", "g++", "clang++")


def check_compiler(device: str, key: str) -> None:
    """Raise unless there is what compiling for a device needs.

    Args:
        device: ``cpu`` or ``cuda:N``.
        key: Of the config, for the message.

    Raises:
        ConfigError: Names what is missing.
    """
    on_gpu = device.startswith("cuda")
    own = os.environ.get("CC" if on_gpu else "CXX")
    names = (own,) if own else _C if on_gpu else _CXX
    if on_gpu and find_spec("triton") is None:
        raise ConfigError(
            f"{key}: torch.compile needs triton on a GPU; pip install triton, or set "
            "compile: false"
        )
    if not any(shutil.which(name) for name in names):
        raise ConfigError(
            f"{key}: torch.compile needs a compiler on {device}, and none of "
            f"{', '.join(names)} is there; install one, or set compile: false"
        )


def plain_passes(*, compiled: bool) -> AbstractContextManager[Any]:
    """Let what is compiled, if anything is, run as it is."""
    if not compiled:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def compile_blocks_(blocks: Iterable[nn.Module]) -> None:
    """Let blocks be compiled when they are first called."""
    for block in blocks:
        block.compile(dynamic=False)


def many_kinds(*, compiled: bool) -> AbstractContextManager[Any]:
    """Let as many kinds of a function be compiled as blocks may have widths.

    What a caller compiles himself keeps his settings outside of it.
    """
    if not compiled:
        return nullcontext()
    config: Any = torch._dynamo.config
    settings: AbstractContextManager[Any] = config.patch(
        recompile_limit=_MOST_KINDS,
        accumulated_recompile_limit=_MOST_KINDS,
        fail_on_recompile_limit_hit=True,
    )
    return settings
