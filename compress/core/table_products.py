"""Products with a matrix of positional tables that is never decoded.

Each run ``J`` of columns has tables ``C`` that all rows share, so what an input makes
of an entry is computed once for all of them:

    t[J, m, k] = x_J . C[J, m, k]                     2^B M C multiplications
    y_v = s_v sum_J sum_m t[J, m, code_(v, J, m)]     C M / g additions a row

Exact: the same sums as those of the decoded matrix, in another order. For one token
and ``pq-4x8`` on 49,152 x 576 these are 0.15 million multiplications and 7 million
additions in the place of 28 million of both; for many tokens at a time a product with
the decoded matrix is faster.

Source: Jegou et al. (2011), "Product quantization for nearest neighbor search"
(asymmetric distances); VQ-Logits, arXiv 2505.10202, for logits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.core.packing import unpack_bytes
from compress.core.scheme import Scheme

_CODES_AT_ONCE = 1 << 22  # unpacked in one step, which bounds the memory


def is_positional(scheme: Scheme) -> bool:
    """Whether products can be taken by tables."""
    return scheme.codebook is not None and scheme.codebook.positional


def products(inputs: Tensor, stored: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """Return ``inputs @ W.T`` float32 ``[..., R]``.

    Args:
        inputs: ``[..., C]``, any float type.
        stored: Packed codes, tables and scales, as ``palette_format`` has them.
        scheme: One that is positional.
    """
    book = scheme.codebook
    assert book is not None and book.positional
    tables, codes = stored["tables"].float(), stored["codes"]
    runs, count, _, vector = tables.shape
    x = inputs.reshape(-1, runs, vector).float()
    # What each entry gives for each input, float32 [J * M, N, K].
    sums = torch.einsum("njg,jmkg->jmnk", x, tables).flatten(0, 1)
    found = sums.new_zeros(len(x), len(codes))
    step = max(1, _CODES_AT_ONCE // (runs * count))
    for start in range(0, len(codes), step):
        part = slice(start, start + step)
        places = unpack_bytes(codes[part], scheme.bits, runs * count).T.contiguous()
        for own, place in zip(sums, places, strict=True):
            found[:, part] += own.index_select(1, place.int())
    if book.scaled:
        found *= stored["scale"].float().T
    return found.view(*inputs.shape[:-1], len(codes))
