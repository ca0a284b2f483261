"""Codes whose continuous parts can be trained, and which can be chosen again.

Training needs five things of codes, whatever they point to: the values, differentiable
in the numbers that are stored beside the codes; these numbers; how far a wanted change
moves each *unit*; the best code of a unit for a wanted value; and the stored form. A
unit is what one code (or one code of each table) stands for: ``g`` neighbouring columns
of a row, a single weight on a grid.

Matrices of one shape and scheme are held together, ``B`` at a time, so that a step is a
few large operations. Numbers are kept in float32 and are rounded to their storage type
whenever values are made, with the identity as gradient: what is trained, measured and
stored are the same values, bit for bit.

Source: Malinovskii et al. (2024), "PV-Tuning", arXiv 2405.14852, for the alternation of
continuous and discrete steps that this serves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.core.errors import SchemeError
from compress.core.scales import TORCH_DTYPES
from compress.core.scheme import Scales, Scheme
from compress.core.tensors import QuantizedTensor

# Numbers that a search for codes holds at once: tables of distances, mostly.
_VALUES_AT_ONCE = {"cpu": 1 << 22}
_VALUES_AT_ONCE_ELSEWHERE = 1 << 26


class TunableCodes(ABC):
    """Codes of ``B`` matrices ``[R, C]`` of one scheme.

    Args:
        tensors: The matrices; equal in shape and scheme.
        device: Where they are held.

    Attributes:
        scheme: Of all of them.
        shape: ``B``, ``R``, ``C``.
        vector: Columns of a unit, ``g``.
        codes: ``[B, U, M]`` as stored, ``U = R C / g`` units row by row, with ``M``
            codes each.
    """

    codes: Tensor
    vector: int = 1

    def __init__(self, tensors: Sequence[QuantizedTensor], device: Any) -> None:
        self.scheme: Scheme = tensors[0].scheme
        self.shape = (len(tensors), *tensors[0].shape)
        self.device = torch.device(device)
        self.notes = [tensor.notes for tensor in tensors]
        self._parameters: dict[str, Tensor] = {}

    @property
    def units(self) -> int:
        """Units of one matrix."""
        return self.shape[1] * self.shape[2] // self.vector

    def continuous_parameters(self) -> Mapping[str, Tensor]:
        """Return the float32 leaves ``[B, ...]`` that are trained, by name."""
        return self._parameters

    @abstractmethod
    def decode(self) -> Tensor:
        """Return float32 values ``[B, R, C]``, differentiable in the numbers."""

    @abstractmethod
    def settle_(self) -> None:
        """Keep numbers that a step has changed where codes mean something."""

    @abstractmethod
    def project(
        self,
        target: Tensor,
        units: Tensor | None,
        *,
        beam: int = 1,
        order: Sequence[int] = (0,),
    ) -> Tensor:
        """Return the codes nearest to wanted values.

        Args:
            target: float32 ``[B, R, C]``.
            units: int64 ``[B, n]``, which units; ``None`` for all.
            beam: Candidates that are kept from table to table.
            order: In which tables are visited, where several are summed.

        Returns:
            ``[B, n, M]`` as stored. A unit's error is never larger than that of its
            present codes, rounding apart.
        """

    @abstractmethod
    def values(self, codes: Tensor, units: Tensor | None) -> Tensor:
        """Return float32 ``[B, n, g]`` that codes ``[B, n, M]`` mean at units."""

    @abstractmethod
    def result(self) -> list[QuantizedTensor]:
        """Return the stored form of each matrix, on the CPU.

        Raises:
            SchemeError: A number is not finite.
        """

    def group_norms(self, delta: Tensor) -> Tensor:
        """Return the length ``[B, U]`` of each unit's part of ``[B, R, C]``."""
        parts = delta.reshape(len(delta), -1, self.vector)
        norms: Tensor = torch.linalg.vector_norm(parts, dim=-1)
        return norms

    def chosen(self, units: Tensor | None) -> Tensor:
        """Return the present codes ``[B, n, M]`` of units."""
        return self.codes if units is None else gathered(self.codes, units)

    def replace_(self, codes: Tensor, units: Tensor | None) -> None:
        """Put codes ``[B, n, M]`` in the place of those of units."""
        if units is None:
            self.codes.copy_(codes)
        else:
            wide = units.unsqueeze(-1).expand(-1, -1, self.codes.shape[2])
            self.codes.scatter_(1, wide, codes)

    def state(self) -> dict[str, Tensor]:
        """Return all that training changes, by name; not copied."""
        return {"codes": self.codes} | {
            name: value.detach() for name, value in self._parameters.items()
        }

    @torch.no_grad()
    def load_(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` returned."""
        for name, value in self.state().items():
            value.copy_(state[name])

    def _parts(self, target: Tensor, units: Tensor | None) -> Tensor:
        """Return ``[B, n, g]`` of ``[B, R, C]``."""
        parts = target.reshape(len(target), -1, self.vector)
        return parts if units is None else gathered(parts, units)

    def _train(self, name: str, stored: Sequence[Tensor]) -> None:
        """Make numbers of the matrices a leaf that is trained."""
        values = torch.stack([value.float() for value in stored]).to(self.device)
        self._parameters[name] = values.requires_grad_()

    def _stored(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the numbers as a loader reads them; identity as gradient."""
        kind = dtype or TORCH_DTYPES[self.scheme.scale_dtype]
        rounded: Tensor = _Rounded.apply(  # type: ignore[no-untyped-call]
            self._parameters[name], kind
        )
        return rounded

    def _finite(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the numbers in their storage type, on the CPU."""
        kind = dtype or TORCH_DTYPES[self.scheme.scale_dtype]
        values = self._stored(name, kind).detach().cpu()
        if not bool(torch.isfinite(values).all()):
            raise SchemeError(
                f"tuning {self.scheme.name}: {name} is not finite any more; lower "
                "tune.options.learning_rate"
            )
        return values.to(kind)

    def _room(self, each: int) -> int:
        """Return how many units fit in one go, at so many numbers each."""
        most = _VALUES_AT_ONCE.get(self.device.type, _VALUES_AT_ONCE_ELSEWHERE)
        return max(1, most // max(1, each))


class _Rounded(torch.autograd.Function):
    """Rounds to a type that can be stored, within its range; identity as gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dtype: torch.dtype) -> Tensor:
        most = torch.finfo(dtype).max
        return values.clamp(-most, most).to(dtype).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def gathered(values: Tensor, units: Tensor) -> Tensor:
    """Return ``[B, n, g]``: rows ``units`` ``[B, n]`` of values ``[B, U, g]``."""
    wide = units.unsqueeze(-1).expand(-1, -1, values.shape[2])
    return values.gather(1, wide)


def tuning_problem(scheme: Scheme) -> str | None:
    """Return why codes of a scheme cannot be tuned, and what to take instead."""
    if scheme.rank:
        return (
            f"{scheme.name} adds a low-rank correction, which tuning does not train; "
            f"use {scheme.name.partition('-lorc')[0]}"
        )
    if scheme.scales not in (Scales.FREE, Scales.SUPER):
        return (
            f"{scheme.name} stores its scales as {scheme.scales.value}, which are no "
            "free numbers to train; use a scheme with float scales, such as int4-g64, "
            "fp4-g32 or palette4"
        )
    return None


def tunable(tensors: Sequence[QuantizedTensor], device: Any = "cpu") -> TunableCodes:
    """Return codes that can be tuned.

    Args:
        tensors: Of one shape and scheme.
        device: Where they are held.

    Raises:
        SchemeError: Their scheme cannot be tuned.
    """
    from compress.core.tunable_grids import GridCodes
    from compress.core.tunable_tables import TableCodes

    scheme = tensors[0].scheme
    problem = tuning_problem(scheme)
    if problem is not None:
        raise SchemeError(problem)
    kind = GridCodes if scheme.codebook is None else TableCodes
    return kind(tensors, device)
