"""The kernel of the column loop against the loop: on a GPU, else interpreted."""

from __future__ import annotations

import os

import pytest
import torch

from compress.core import feedback, grids
from compress.core.scheme import Scheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":  # read when the kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
kernel = pytest.importorskip("compress.core.feedback_kernel")

SCHEMES = (
    "int4-g32",
    "int8-g64",
    "int4-g32-asym",
    "int4-g32-offset",
    "fp8-g64",
    "nvfp4",
    "mxfp4",
)


def made_up(scheme: Scheme, rows: int, columns: int) -> list[torch.Tensor]:
    """Return a target, an upper factor, scales and zero points, columns first."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    inputs = torch.randn(512, columns, generator=generator)
    order = torch.arange(columns)
    upper = feedback.inverse_factor(inputs.T @ inputs / 512, order)
    assert upper is not None
    found = grids.search_parameters(grids.as_groups(weight, scheme), scheme)
    wide = [
        feedback._spread(x, columns, order)
        for x in (found.scale, found.zero)
        if x is not None
    ]
    return [x.to(DEVICE) for x in (weight.T.contiguous(), upper, *wide)]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("rows", "columns"), [(37, 128), (16, 64)])
def test_the_kernel_does_what_the_loop_does(name: str, rows: int, columns: int) -> None:
    scheme = Scheme.parse(name)
    work, upper, scale, *zero = made_up(scheme, rows, columns)
    outcome = []
    for function in (feedback.round_columns_, kernel.round_columns_):
        levels, errors = torch.full_like(work, 77.0), torch.full_like(work, 77.0)
        function(
            work.clone(),
            upper,
            scale,
            zero[0] if zero else None,
            scheme,
            levels=levels,
            errors=errors,
        )
        outcome.append((levels, errors))
    (levels, errors), (found, others) = outcome
    # A sum that is rounded otherwise tips a number half way between two levels, and
    # what follows in its row with it.
    alike = (found == levels).all(0)
    assert float(alike.float().mean()) > 0.9
    assert torch.allclose(others[:, alike], errors[:, alike], atol=1e-5)


def test_a_part_of_a_larger_factor_is_read_by_its_rows() -> None:
    scheme = Scheme.parse("int4-g32")
    work, upper, scale = made_up(scheme, 16, 64)
    large = torch.full((100, 100), 9.0, device=work.device)
    large[20:84, 20:84] = upper
    outcome = []
    for factor in (upper, large[20:84, 20:84]):
        levels, errors = torch.empty_like(work), torch.empty_like(work)
        kernel.round_columns_(
            work, factor, scale, None, scheme, levels=levels, errors=errors
        )
        outcome.append(levels)
    assert torch.equal(*outcome)
