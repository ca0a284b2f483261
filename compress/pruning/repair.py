"""What the rest of an MLP does about neurons that are gone, or attention about heads.

* ``least_squares``: ``down`` of what stays takes over what goes, as well as it can on
  the calibration text; with ``propagate: corrected`` also what went wrong before it.
* ``mask``: one factor for each neuron that stays; for little memory or text.
* ``bias``: what the neurons added on average becomes a bias of ``down`` (FLAP). Only
  Llama's config has one.
* ``none``.

Source: ``core/compensation.py``; the bias of An et al., FLAP (arXiv 2312.11983).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from compress.core.compensation import (
    complement,
    fitted,
    least_squares,
    scaled_columns,
)
from compress.core.neurons import GatedMLP, NeuronStatistics, Wanted

Repair = Literal["auto", "least_squares", "mask", "bias", "none"]


@dataclass(frozen=True)
class Repaired:
    """What becomes of a ``down`` matrix.

    Attributes:
        down: float32 ``[H, len(kept)]``.
        bias: float32 ``[H]`` to be added, if there is one.
        error: ``E|y - y'|^2 / E|y|^2`` of its output on the calibration text, ``y`` the
            wanted one; ``None`` without statistics.
    """

    down: Tensor
    bias: Tensor | None
    error: float | None


def repaired(
    mlp: GatedMLP,
    statistics: NeuronStatistics | None,
    kept: Tensor,
    repair: str,
) -> Repaired:
    """Return ``down`` for the neurons that stay; see :func:`repaired_columns`."""
    return repaired_columns(mlp.down, statistics, kept, repair=repair)


def repaired_columns(
    weight: Tensor, statistics: NeuronStatistics | None, kept: Tensor, *, repair: str
) -> Repaired:
    """Return a matrix for the inputs that stay.

    Args:
        weight: float32 ``[H, I]``: ``down`` of an MLP, or o of attention.
        statistics: Of its inputs; needed by every repair but ``none``.
        kept: int64, ascending: the columns that stay. If all do, there is nothing to
            repair, unless another output is wanted.
        repair: Resolved, that is, not ``auto``.
    """
    wanted = None if statistics is None else statistics.wanted
    if len(kept) == weight.shape[1] and wanted is None:
        return Repaired(weight, None, None if statistics is None else 0.0)
    if statistics is None:
        assert repair == "none", f"{repair} needs statistics"
        return Repaired(weight[:, kept], None, None)
    bias = None
    if wanted is not None:
        assert repair == "least_squares", f"{repair} fits no other output"
        down = fitted(weight, statistics.gram, wanted.products, kept)
        return Repaired(down, None, _distance(down, statistics.gram, wanted, kept))
    if repair == "least_squares":
        down = least_squares(weight, statistics.gram, kept)
    elif repair == "mask":
        down = scaled_columns(weight, statistics.gram, kept)
    else:
        down = weight[:, kept]
    if repair == "bias":
        gone = complement(kept, weight.shape[1])
        bias = weight[:, gone] @ statistics.mean[gone]
    return Repaired(down, bias, output_error(weight, down, statistics, kept, bias))


def output_error(
    dense: Tensor,
    down: Tensor,
    statistics: NeuronStatistics,
    kept: Tensor,
    bias: Tensor | None = None,
) -> float:
    """Return the mean squared error of the output, relative to its mean square."""
    change = dense.double().clone()
    change[:, kept] -= down.double()
    gram, power = statistics.gram.double(), dense.double()
    error = ((change @ gram) * change).sum()
    if bias is not None:
        moved = change @ statistics.mean.double()
        error = error - 2 * bias.double() @ moved + bias.double().square().sum()
    total = ((power @ gram) * power).sum().clamp(min=1e-30)
    return max(0.0, float(error / total))


def _distance(down: Tensor, gram: Tensor, wanted: Wanted, kept: Tensor) -> float:
    """Return the mean squared distance to a wanted output, relative to its power."""
    wide = down.double()
    own = ((wide @ gram[kept][:, kept].double()) * wide).sum()
    both = (wide * wanted.products[:, kept].double()).sum()
    error = wanted.power - 2 * float(both) + float(own)
    return max(0.0, error / max(wanted.power, 1e-30))
