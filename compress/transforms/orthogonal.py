"""Orthogonal matrices of any size, as products of small factors.

``R = diag(signs) (F_1 x F_2 x ... x F_k)`` with random signs and Kronecker factors: an
input is turned by a few small products, and ``R`` itself is never written down. Factors
are Hadamard matrices (all entries of one magnitude, so that an outlier is spread
evenly) of 2, 4, ..., 64 and of 12, 20, 28; what remains of the size is odd and gets a
random orthogonal factor. 576 = 12 x 12 x 4 and 768 = 12 x 64 need none.

Source: Ashkboos et al. (2024), "QuaRot", section 3, for random Hadamard rotations;
Paley (1933), "On orthogonal matrices", for the orders 12, 20 and 28.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Odd primes p for which a Hadamard matrix of order 4p is made here.
_PALEY = (7, 5, 3)
_LARGEST_SYLVESTER = 64


@dataclass(frozen=True)
class Orthogonal:
    """An orthogonal matrix ``R`` ``[n, n]``.

    Attributes:
        signs: float32 ``[n]`` of ones and minus ones.
        factors: float32 orthogonal matrices whose sizes multiply to ``n``.
    """

    signs: Tensor
    factors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """``n``."""
        return len(self.signs)

    def apply(self, values: Tensor) -> Tensor:
        """Return ``values R`` for float32 ``[..., k n]``, each run of ``n`` by itself.

        A new tensor; ``values`` stays as it is.
        """
        shape = values.shape
        turned = values.reshape(-1, self.size) * self.signs
        for factor in self.factors:
            # One axis at a time: the last one is turned, and moves to the front.
            turned = turned.view(turned.shape[0], -1, len(factor)) @ factor
            turned = turned.transpose(1, 2).contiguous().view(len(turned), -1)
        return turned.view(shape)


def random_orthogonal(size: int, seed: int) -> Orthogonal:
    """Return an orthogonal matrix that depends on ``size`` and ``seed`` only."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).float().mul_(2).sub_(1)
    factors: list[Tensor] = []
    rest = size
    for prime in _PALEY:
        while rest % (4 * prime) == 0:
            factors.append(paley(prime))
            rest //= 4 * prime
    while rest % 2 == 0:
        power = min(rest & -rest, _LARGEST_SYLVESTER)
        factors.append(sylvester(power))
        rest //= power
    if rest > 1:
        noise = torch.randn(rest, rest, dtype=torch.float64, generator=generator)
        turn, triangle = torch.linalg.qr(noise)
        # Uniform over rotations, and the same for every QR there is.
        factors.append((turn * triangle.diagonal().sign()).float())
    return Orthogonal(signs, tuple(factors))


def sylvester(size: int) -> Tensor:
    """Return the Hadamard matrix of a power of two, over its root: orthogonal."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    block = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(matrix, block)
    scaled: Tensor = matrix / math.sqrt(size)
    return scaled.float()


def paley(prime: int) -> Tensor:
    """Return a Hadamard matrix of order ``4 prime`` (12, 20, 28), over its root."""
    order = 4 * prime
    identity = torch.eye(order, dtype=torch.float64)
    if order == 28:  # 27 is no prime: the second construction, from 13
        core = _conference(13)
        block, other = (
            torch.tensor([[1, 1], [1, -1]]),
            torch.tensor([[1, -1], [-1, -1]]),
        )
        half = torch.eye(14, dtype=torch.float64)
        matrix = torch.kron(core, block.double()) + torch.kron(half, other.double())
    else:
        matrix = identity + _conference(order - 1)
    scaled: Tensor = matrix / math.sqrt(order)
    return scaled.float()


def _conference(q: int) -> Tensor:
    """Return Paley's ``[q + 1, q + 1]`` matrix of quadratic residues, zero diagonal."""
    squares = {i * i % q for i in range(1, q)}
    core = torch.tensor(
        [
            [0 if i == j else 1 if (i - j) % q in squares else -1 for j in range(q)]
            for i in range(q)
        ],
        dtype=torch.float64,
    )
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[1:, 1:] = core
    matrix[0, 1:] = 1
    matrix[1:, 0] = 1 if q % 4 == 1 else -1
    return matrix
