"""The arithmetic of a step, against closed forms and a problem of known optimum."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.core.tunable import TunableCodes, tunable
from compress.tuning.steps import direction, relative, selected, trusted


def test_directions_are_those_of_torchs_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(5))
    adam = torch.optim.Adam([weight], lr=1.0, betas=(0.9, 0.95), eps=1e-10)
    first, second = torch.zeros(5), torch.zeros(5)
    for number in range(4):
        gradient = torch.randn(5, generator=generator)
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        adam.step()
        found = direction(
            gradient,
            second,
            beta=0.95,
            number=number,
            first=first,
            first_beta=0.9,
        )
        torch.testing.assert_close(found, before - weight.detach())


def test_a_first_step_without_first_moment_is_a_sign() -> None:
    gradient = torch.tensor([3.0, -0.5, 0.0])
    found = direction(gradient, torch.zeros(3), beta=0.95, number=0)
    torch.testing.assert_close(found, torch.tensor([1.0, -1.0, 0.0]))


def test_relative_sizes_are_of_each_matrix_and_one_where_there_is_none() -> None:
    values = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    change = torch.tensor([[0.0, 2.0], [1.0, 1.0], [0.0, 0.0]])
    found = relative(values.unsqueeze(-1), change.unsqueeze(-1))
    assert found.shape == (3, 1, 1)
    assert found.flatten().tolist() == [2.5, 1.0, 1.0]


def test_the_share_is_rounded_up_and_the_largest_come_first() -> None:
    wishes = torch.tensor([[0.1, 0.9, 0.5, 0.2, 0.3]])
    found = selected(wishes, 0.21, ordered=False)
    assert found is not None and found.tolist() == [[1, 2]]
    assert selected(wishes, 1.0, ordered=False) is None
    found = selected(wishes, 1.0, ordered=True)
    assert found is not None and found.tolist() == [[1, 2, 4, 3, 0]]


def test_trusted_changes_are_a_prefix_within_the_limit() -> None:
    change = torch.tensor([[4.0, 1.0, 0.5, 0.5], [9.0, 1.0, 0.0, 0.0]])
    found = trusted(change, torch.tensor([5.0, 5.0]))
    assert found.tolist() == [
        [True, True, False, False],
        [True, False, False, False],
    ]


class Quadratic:
    """``f(w) = (w - t)^T A (w - t) / 2`` of six weights with at most four values."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(6, 6, generator=generator)
        self.curvature = root @ root.T + 0.1 * torch.eye(6)
        self.wanted = torch.randn(6, generator=generator)
        scheme = Scheme.parse("palette2-tensor").with_scales("float32")
        codes = torch.randint(4, (1, 6), generator=generator).to(torch.uint8)
        tables = torch.randn(1, 1, 4, 1, generator=generator)
        one = torch.ones(1, 1)
        tensor = QuantizedTensor(codes, one, None, scheme, tables=tables)
        self.codes: TunableCodes = tunable([tensor])

    def loss(self) -> Tensor:
        error = self.codes.decode().flatten() - self.wanted
        return 0.5 * error @ self.curvature @ error

    def best_table(self, places: Tensor) -> tuple[Tensor, float]:
        """Return the table of least loss for given codes, and the loss."""
        design = torch.nn.functional.one_hot(places.long(), 4).float()
        normal = design.T @ self.curvature @ design
        right = design.T @ self.curvature @ self.wanted
        table = torch.linalg.lstsq(normal, right, driver="gelsd").solution
        error = design @ table - self.wanted
        return table, float(0.5 * error @ self.curvature @ error)

    def optimum(self) -> float:
        codes = itertools.product(range(4), repeat=6)
        return min(self.best_table(torch.tensor(code))[1] for code in codes)

    def exact_p_(self) -> None:
        table, _ = self.best_table(self.codes.codes.flatten())
        with torch.no_grad():
            self.codes.continuous_parameters()["tables"].copy_(
                table.view(1, 1, 1, 4, 1)
            )

    def exact_v_(self) -> None:
        """Choose the best of all assignments to the present table."""
        every = torch.tensor(list(itertools.product(range(4), repeat=6)))
        table = self.codes.continuous_parameters()["tables"].flatten()
        error = table[every] - self.wanted
        loss = ((error @ self.curvature) * error).sum(1)
        best = every[loss.argmin()].to(torch.uint8)
        self.codes.replace_(best.view(1, 6, 1), None)

    def linearized_v_(self, rate: float, share: float) -> None:
        values = self.codes.decode()
        (slope,) = torch.autograd.grad(self.loss_of(values), values)
        target = values.detach() - rate * slope
        wishes = self.codes.group_norms(target - values.detach())
        units = selected(wishes, share, ordered=False)
        self.codes.replace_(self.codes.project(target, units), units)

    def loss_of(self, values: Tensor) -> Tensor:
        error = values.flatten() - self.wanted
        return 0.5 * error @ self.curvature @ error


@pytest.mark.parametrize("seed", range(4))
def test_exact_steps_fall_to_no_less_than_the_optimum(seed: int) -> None:
    problem = Quadratic(seed)
    losses = [problem.loss().item()]
    for _ in range(6):
        problem.exact_p_()
        losses.append(problem.loss().item())
        problem.exact_v_()
        losses.append(problem.loss().item())
    slack = 1e-4 * losses[0]
    assert all(b <= a + slack for a, b in itertools.pairwise(losses))
    assert losses[-1] >= problem.optimum() - slack


@pytest.mark.parametrize("seed", range(4))
def test_small_linearized_steps_in_a_subspace_never_rise(seed: int) -> None:
    problem = Quadratic(seed)
    steepest = float(torch.linalg.eigvalsh(problem.curvature)[-1])
    losses = [problem.loss().item()]
    changed = 0
    for number in range(12):
        before = problem.codes.codes.clone()
        # Below 1 / L a projected step in one coordinate cannot rise.
        problem.linearized_v_(1 / steepest, 1 / 6)
        changed += int((problem.codes.codes != before).sum())
        losses.append(problem.loss().item())
        if number % 3 == 2:
            problem.exact_p_()
            losses.append(problem.loss().item())
    slack = 1e-4 * losses[0]
    assert all(b <= a + slack for a, b in itertools.pairwise(losses))
    assert losses[-1] >= problem.optimum() - slack
    assert changed or seed  # the first problem does move
