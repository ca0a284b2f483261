"""Codes on their way between processes: tensors, and what describes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.distributed.team import Team


@dataclass(frozen=True)
class About:
    """What describes one matrix of codes, as plain data.

    Attributes:
        scheme: As a dictionary.
        notes: Of the matrix.
    """

    scheme: dict[str, Any]
    notes: tuple[str, ...]


def packed(
    codes: Mapping[str, QuantizedTensor],
) -> tuple[dict[str, Tensor], dict[str, About]]:
    """Return the tensors of all matrices by ``NAME/PART``, and what describes each."""
    tensors = {
        f"{name}/{part}": tensor
        for name, matrix in codes.items()
        for part, tensor in matrix.state().items()
    }
    about = {n: About(x.scheme.to_dict(), x.notes) for n, x in codes.items()}
    return tensors, about


def unpacked(
    tensors: Mapping[str, Tensor], about: Mapping[str, About]
) -> dict[str, QuantizedTensor]:
    """Return what :func:`packed` was given; other tensors may lie beside."""
    states: dict[str, dict[str, Tensor]] = {name: {} for name in about}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("/")
        if name in states:
            states[name][part] = tensor
    return {
        name: QuantizedTensor.from_state(
            states[name], Scheme.from_dict(said.scheme), said.notes
        )
        for name, said in about.items()
    }


def from_first(
    team: Team, codes: Mapping[str, QuantizedTensor], device: torch.device | str
) -> dict[str, QuantizedTensor]:
    """Return the first process's codes, on ``device`` in all of them."""
    tensors, about = packed(codes if team.is_first else {})
    return unpacked(*team.exchange(tensors, about, device)[0])
