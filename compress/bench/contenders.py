"""Ways to compute a linear layer: torch's libraries in 16 and 8 bits, and ours.

Ways that round their inputs come twice: with the rounding, which is what a layer costs,
and with the product alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.core.errors import KernelError
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.runtime.w6a8 import engines
from compress.runtime.w6a8.abi import Kernels
from compress.runtime.w6a8.ops import quant_act, w6a8_linear, w6a8_matmul
from compress.runtime.w6a8.tiles import TiledWeight

GROUP = 128
_E4M3_MOST = 448.0
_BASE = "bf16"


@dataclass(frozen=True)
class Contender:
    """A way to compute ``x @ W.T`` for a bfloat16 ``x``.

    Attributes:
        name: In the table.
        weight_bytes: Of one weight, scales included.
        kind: ``bf16`` or ``int8``: whose peak bounds it.
        weight: Makes a random weight.
        inputs: Makes from ``x`` what the call is given; not timed.
        call: The timed part.
    """

    name: str
    weight_bytes: int
    kind: str
    weight: Callable[[], Any]
    inputs: Callable[[Tensor], Any]
    call: Callable[[Any, Any], Tensor]


def contenders(rows: int, columns: int, device: torch.device) -> list[Contender]:
    """Return what is compared; the first is the base of ratios.

    Args:
        rows: Of the weight.
        columns: Likewise.
        device: Where weights are made.
    """
    shape = rows, columns
    found = [_bf16(shape, device), *_int8(shape, device), *_fp8(shape, device)]
    for group in (GROUP, columns):
        found += _ours(shape, group, device)
    if isinstance(engines.available(device, torch.bfloat16), Kernels):
        found += _triton(shape, device)
    return found


def engine_in_words(device: torch.device) -> str:
    """Return what computes our rows, and why if it is not compiled code."""
    compiled = engines.available(device, torch.bfloat16)
    if isinstance(compiled, Kernels):
        return "compiled kernels"
    if engines.engine_for(device, torch.bfloat16) is None:
        return f"plain torch ({compiled})"
    return f"Triton ({compiled})"


def random_tiles(
    shape: tuple[int, int], group: int, device: torch.device
) -> TiledWeight:
    """Return a random weight as tiles; any byte is a code."""
    rows, columns = shape
    # Shapes of the tiles, without memory for codes.
    codes = torch.empty(shape, dtype=torch.int8, device="meta")
    scale = torch.empty(rows, columns // group, dtype=torch.bfloat16, device="meta")
    scheme = Scheme.parse(f"w6a8-g{group}").with_scales("bfloat16")
    given = QuantizedTensor(codes, scale, None, scheme)
    empty = TiledWeight.from_quantized(given)
    sizes = empty.tiles.shape, empty.scales.shape
    tiles = torch.randint(0, 256, sizes[0], dtype=torch.uint8, device=device)
    scales = 0.01 * torch.rand(sizes[1], device=device)
    return TiledWeight(tiles, scales.bfloat16(), shape, group)


def _bf16(shape: tuple[int, int], device: torch.device) -> Contender:
    return Contender(
        _BASE,
        2 * shape[0] * shape[1],
        "bf16",
        lambda: torch.randn(shape, device=device, dtype=torch.bfloat16),
        lambda x: x,
        lambda weight, x: F.linear(x, weight),
    )


def _int8(shape: tuple[int, int], device: torch.device) -> list[Contender]:
    """torch._int_mm, which wants more than 16 rows: fewer are filled up."""
    rows, columns = shape

    def weight() -> tuple[Tensor, Tensor]:
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        return codes.t(), torch.rand(rows, device=device)

    def filled(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, max(0, 32 - len(x))))

    def whole(weight: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        codes, scale = quant_act(x, columns)
        sums = torch._int_mm(codes[:, :columns], weight[0])
        found: Tensor = (sums * scale * weight[1]).bfloat16()
        return found

    size = rows * columns + 4 * rows
    return [
        Contender("int8", size, "int8", weight, filled, whole),
        Contender(
            "int8 product alone",
            size,
            "int8",
            weight,
            lambda x: quant_act(filled(x), columns)[0][:, :columns],
            lambda weight, codes: torch._int_mm(codes, weight[0]),
        ),
    ]


def _fp8(shape: tuple[int, int], device: torch.device) -> list[Contender]:
    """torch._scaled_mm with a scale for each row, inputs rounded by torch itself."""
    rows, columns = shape

    def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / _E4M3_MOST
        return (x / scale).to(torch.float8_e4m3fn), scale

    def weight() -> tuple[Tensor, Tensor]:
        codes, scale = rounded(torch.randn(shape, device=device))
        return codes.t(), scale.t().contiguous()

    def filled(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, -len(x) % 16))

    def product(weight: tuple[Tensor, Tensor], inputs: tuple[Tensor, Tensor]) -> Tensor:
        found: Tensor = torch._scaled_mm(
            inputs[0],
            weight[0],
            scale_a=inputs[1],
            scale_b=weight[1],
            out_dtype=torch.bfloat16,
        )
        return found

    size = rows * columns + 4 * rows
    return [
        Contender(
            "fp8", size, "int8", weight, filled, lambda w, x: product(w, rounded(x))
        ),
        Contender(
            "fp8 product alone",
            size,
            "int8",
            weight,
            lambda x: rounded(filled(x)),
            product,
        ),
    ]


def _ours(shape: tuple[int, int], group: int, device: torch.device) -> list[Contender]:
    rows, columns = shape
    name = "w6a8" if group == columns else f"w6a8-g{group}"

    def whole(weight: TiledWeight, x: Tensor) -> Tensor:
        found: Tensor = w6a8_linear(
            *(x, weight.tiles, weight.scales, None, rows, columns, group, columns)
        )
        return found

    def product(weight: TiledWeight, inputs: tuple[Tensor, Tensor]) -> Tensor:
        found: Tensor = w6a8_matmul(
            *(*inputs, weight.tiles, weight.scales, None),
            *(rows, columns, group, torch.bfloat16),
        )
        return found

    size = rows * columns * 6 // 8 + 2 * rows * (columns // group)
    return [
        Contender(
            name,
            size,
            "int8",
            lambda: random_tiles(shape, group, device),
            lambda x: x,
            whole,
        ),
        Contender(
            f"{name} product alone",
            size,
            "int8",
            lambda: random_tiles(shape, group, device),
            lambda x: quant_act(x, columns),
            product,
        ),
    ]


def _triton(shape: tuple[int, int], device: torch.device) -> list[Contender]:
    """Return our way in Triton, where compiled kernels are what models use."""
    rows, columns = shape
    kernels = engines.triton_kernels(device.index)
    if isinstance(kernels, KernelError):
        return []

    def whole(weight: TiledWeight, x: Tensor) -> Tensor:
        inputs = kernels.quantize(x, columns)
        return kernels.linear(inputs, weight, None, dtype=torch.bfloat16)

    return [
        Contender(
            f"w6a8-g{GROUP}, Triton",
            rows * columns * 6 // 8 + 2 * rows * (columns // GROUP),
            "int8",
            lambda: random_tiles(shape, GROUP, device),
            lambda x: x,
            whole,
        )
    ]
