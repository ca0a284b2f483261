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
    runs, count, entries, vector = tables.shape
    x = inputs.reshape(-1, runs, vector).float()
    # [J * M * K, N]: what each entry gives for each input
    sums = torch.einsum("njg,jmkg->jmkn", x, tables).reshape(-1, len(x))
    first = torch.arange(runs * count, device=codes.device) * entries
    found = sums.new_empty(len(codes), len(x))
    step = max(1, _CODES_AT_ONCE // (runs * count))
    for start in range(0, len(codes), step):
        part = slice(start, start + step)
        places = unpack_bytes(codes[part], scheme.bits, runs * count).long() + first
        bags = torch.nn.functional.embedding_bag(places, sums, mode="sum")
        found[part] = bags * stored["scale"][part].float() if book.scaled else bags
    return found.T.reshape(*inputs.shape[:-1], len(codes))
