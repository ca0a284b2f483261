"""Compiles Triton's W6A8 kernels for GPUs that need not be there; prints what came out.

    python tests/emulated/triton_compile.py 80 90

A line for each kernel and architecture: its name, the architecture, bytes of shared
memory, and how many tensor-core instructions it has.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.runtime.w6a8 import triton_kernels as kernels

LINEAR = {
    **{"codes": "*i8", "input_scales": "*fp32", "tiles": "*u8", "scales": "*bf16"},
    **{"bias": "*bf16", "outputs": "*bf16"},
    **dict.fromkeys(("tokens", "rows", "padded_rows", "across"), "i32"),
    **dict.fromkeys(("run_of_split", "input_groups", "input_group"), "i32"),
    **dict.fromkeys(("weight_groups", "weight_group"), "i32"),
}
ROUNDED = {
    **{"inputs": "*bf16", "codes": "*i8", "scales": "*fp32"},
    **dict.fromkeys(("columns", "padded", "groups"), "i32"),
}
NORM = ROUNDED | {"weight": "*bf16", "eps": "fp32"}
DECODE = {
    **{"tiles": "*u8", "scales": "*bf16", "outputs": "*bf16"},
    **dict.fromkeys(("rows", "padded_rows", "columns", "across", "group"), "i32"),
}
CASES: list[tuple[Any, dict[str, str], dict[str, Any], int]] = [
    *(
        (
            kernels.linear_kernel,
            LINEAR,
            dict(
                HAS_BIAS=bias, FLUSH=flush, RUN=run, PANEL=64, ROWS=rows, TOKENS=tokens
            ),
            warps,
        )
        for rows, tokens, warps in ((32, 16, 4), (64, 64, 4), (128, 128, 8))
        for flush, run, bias in ((True, 128, True), (False, 128, False))
    ),
    (kernels.quantize_kernel, ROUNDED, dict(WIDTH=4096, GROUP=128), 4),
    (kernels.silu_mul_kernel, ROUNDED, dict(WIDTH=16384, GROUP=0), 16),
    (kernels.rms_norm_kernel, NORM, dict(PLUS_ONE=True, WIDTH=4096, GROUP=0), 4),
    (kernels.decode_kernel, DECODE, dict(PANEL=64, ROWS=16, COLUMNS=128), 4),
]


def main() -> None:
    """Compile every case for the architectures that are named."""
    for architecture in map(int, sys.argv[1:]):
        for kernel, types, constants, warps in CASES:
            names = kernel.arg_names
            source = ASTSource(
                fn=kernel,
                signature={name: types.get(name, "constexpr") for name in names},
                constexprs={(names.index(k),): v for k, v in constants.items()},
                attrs={
                    (names.index(k),): [["tt.divisibility", 16]]
                    for k, kind in types.items()
                    if kind.startswith("*")
                },
            )
            compiled = triton.compile(
                source,
                target=GPUTarget("cuda", architecture, 32),
                options={
                    "num_warps": warps,
                    "num_stages": 3 if warps == 4 else 2,
                    "enable_fp_fusion": False,
                },
            )
            found = re.findall(r"\b(wgmma\.mma_async|mma\.sync)", compiled.asm["ptx"])
            shared = compiled.metadata.shared
            print(kernel.fn.__name__, architecture, shared, len(found), flush=True)


if __name__ == "__main__":
    main()
