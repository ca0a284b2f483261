"""Launches of Triton's kernels on tensors; see ``triton_kernels``.

Memory comes from torch's allocator and nothing waits for the device, but for
:meth:`TritonKernels.probe`, so calls can be captured in CUDA graphs once they have been
made before.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from compress.core.errors import KernelError
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.runtime.w6a8 import reference, triton_kernels
from compress.runtime.w6a8.tiles import COLUMNS, TiledWeight, run_of

MOST_COLUMNS = 1 << 16  # of a row that a block holds in registers
_EXACT_COLUMNS = 130_000  # of codes whose products an int32 sums
_STRICT = {"enable_fp_fusion": False}
_BLOCKS_OF_PROCESSOR = 4
_LEAST_TILES_OF_SPLIT = 4


class TritonKernels:
    """What ``engines.py`` offers where no compiled kernels are."""

    def probe(self, device: torch.device) -> None:
        """Compile the kernels for a device and compare them with the reference.

        Raises:
            KernelError: They compute something else.
        """
        generator = torch.Generator().manual_seed(0)
        scheme = Scheme.parse("w6a8-g128")
        codes = torch.randint(-32, 32, (48, 256), generator=generator).to(torch.int8)
        scale = 0.01 * torch.rand(48, 2, generator=generator).half()
        given = QuantizedTensor(codes.to(device), scale.to(device), None, scheme)
        weight = TiledWeight.from_quantized(given)
        x = torch.randn(3, 256, generator=generator).to(device)
        inputs = self.quantize(x, 256)
        expected = reference.quantize_activations(x, None)
        product = self.linear(inputs, weight, None, dtype=torch.float32)
        exact = reference.linear(
            expected, (given.codes, given.scale), None, dtype=torch.float32
        )
        agree = [torch.equal(a, b) for a, b in zip(inputs, expected, strict=True)]
        agree.append(
            torch.equal(self.decode(weight, dtype=torch.float32), given.dequantize())
        )
        agree.append(torch.allclose(product, exact, rtol=1e-4, atol=1e-4))
        if not all(agree):
            raise KernelError(
                "codes, scales, decoded weights and products should be right; "
                f"right are {agree}"
            )

    def quantize(self, inputs: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Return codes and scales of inputs ``[M, K]``; see ``ops.quant_act``."""
        columns = inputs.shape[1]
        if columns > MOST_COLUMNS:
            codes, scales = reference.quantize_activations(inputs, group)
            return torch.nn.functional.pad(codes, (0, -columns % COLUMNS)), scales
        return self._rounded(
            triton_kernels.quantize_kernel, (inputs,), (), inputs, columns, group
        )

    def rms_norm_quantize(
        self, inputs: Tensor, weight: Tensor, eps: float, group: int, *, plus_one: bool
    ) -> tuple[Tensor, Tensor]:
        """Return codes and scales of a norm of ``[M, K]``; see ``fused.py``."""
        columns = inputs.shape[1]
        return self._rounded(
            triton_kernels.rms_norm_kernel,
            (inputs, weight.contiguous()),
            (eps,),
            inputs,
            columns,
            group,
            PLUS_ONE=plus_one,
        )

    def silu_mul_quantize(self, gate_up: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Return codes and scales of ``silu(gate) * up``; see ``fused.py``."""
        columns = gate_up.shape[1] // 2
        return self._rounded(
            triton_kernels.silu_mul_kernel, (gate_up,), (), gate_up, columns, group
        )

    def linear(
        self,
        inputs: tuple[Tensor, Tensor],
        weight: TiledWeight,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return ``inputs @ weight.T + bias`` of codes under scales, ``[M, N]``.

        Args:
            inputs: int8 ``[M, 128 ceil(K / 128)]`` and float32 ``[M, K / group]``.
            weight: The tiles.
            bias: ``[N]`` or ``None``.
            dtype: Of the result.
        """
        codes, input_scales = inputs
        tokens, (rows, columns) = len(codes), weight.shape
        if tokens == 0:
            return codes.new_empty((0, rows), dtype=dtype)
        padded_rows, across = weight.scales.shape[1], weight.tiles.shape[1]
        of_rows, of_tokens, splits = shape_of(tokens, padded_rows, across, codes.device)
        input_group = columns // input_scales.shape[1]
        flush = columns > _EXACT_COLUMNS or min(input_group, weight.group) < columns
        groups = [g if g < columns else None for g in (input_group, weight.group)]
        partial = splits > 1
        outputs = torch.empty(
            (splits, tokens, rows),
            dtype=torch.float32 if partial else dtype,
            device=codes.device,
        )
        grid = (
            triton.cdiv(padded_rows, of_rows),
            triton.cdiv(tokens, of_tokens),
            splits,
        )
        with _on(codes.device):
            triton_kernels.linear_kernel[grid](
                codes,
                input_scales,
                weight.tiles,
                weight.scales,
                weight.scales if bias is None else bias,
                outputs,
                tokens,
                rows,
                padded_rows,
                across,
                triton.cdiv(across, splits),
                input_scales.shape[1],
                input_group,
                weight.scales.shape[0],
                weight.group,
                HAS_BIAS=bias is not None and not partial,
                FLUSH=flush,
                RUN=run_of(*groups),
                PANEL=padded_rows // len(weight.tiles),
                ROWS=of_rows,
                TOKENS=of_tokens,
                num_warps=4 if of_tokens <= 64 else 8,
                num_stages=3 if of_tokens <= 64 else 2,  # 99 KB of shared memory
                **_STRICT,
            )
        if not partial:
            return outputs[0]
        total = outputs.sum(0)
        return (total if bias is None else total + bias.float()).to(dtype)

    def decode(self, weight: TiledWeight, *, dtype: torch.dtype) -> Tensor:
        """Return the values ``[N, K]`` of a weight."""
        rows, columns = weight.shape
        padded_rows, across = weight.scales.shape[1], weight.tiles.shape[1]
        outputs = weight.tiles.new_empty(weight.shape, dtype=dtype)
        grid = (triton.cdiv(rows, 16), across)
        with _on(outputs.device):
            triton_kernels.decode_kernel[grid](
                weight.tiles,
                weight.scales,
                outputs,
                rows,
                padded_rows,
                columns,
                across,
                weight.group,
                PANEL=padded_rows // len(weight.tiles),
                ROWS=16,
                COLUMNS=COLUMNS,
                num_warps=4,
                **_STRICT,
            )
        return outputs

    def _rounded(
        self,
        kernel: Any,
        tensors: tuple[Tensor, ...],
        numbers: tuple[float, ...],
        like: Tensor,
        columns: int,
        group: int,
        **constants: bool,
    ) -> tuple[Tensor, Tensor]:
        """Call a kernel that ends in codes and scales, once for each row."""
        if columns > MOST_COLUMNS:
            raise KernelError(
                f"rows of {columns} columns are longer than the {MOST_COLUMNS} that "
                "Triton's kernels hold; load with fused=False"
            )
        rows, padded = len(like), -(-columns // COLUMNS) * COLUMNS
        codes = like.new_empty((rows, padded), dtype=torch.int8)
        scales = like.new_empty((rows, columns // group), dtype=torch.float32)
        if rows == 0:
            return codes, scales
        width = triton.next_power_of_2(padded)
        with _on(like.device):
            kernel[(rows,)](
                *tensors,
                codes,
                scales,
                *numbers,
                columns,
                padded,
                columns // group,
                WIDTH=width,
                GROUP=0 if group == columns else group,
                num_warps=max(4, min(16, width // 1024)),
                **constants,
                **_STRICT,
            )
        return codes, scales


def shape_of(
    tokens: int, padded_rows: int, across: int, device: torch.device
) -> tuple[int, int, int]:
    """Return rows and tokens of a block, and in how many parts columns are split.

    Args:
        tokens: One or more.
        padded_rows: Of the weight, filled up.
        across: Tiles of 128 columns.
        device: Where it runs.
    """
    of_tokens = next((tile for tile in (16, 32, 64) if tokens <= tile), 128)
    of_rows = 32 if of_tokens <= 16 else 64 if of_tokens <= 64 else 128
    blocks = triton.cdiv(padded_rows, of_rows) * triton.cdiv(tokens, of_tokens)
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = triton.cdiv(_BLOCKS_OF_PROCESSOR * processors, blocks)
    splits = max(1, min(wanted, across // _LEAST_TILES_OF_SPLIT, 16))
    # No split may be left without columns.
    return of_rows, of_tokens, triton.cdiv(across, triton.cdiv(across, splits))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the one that kernels start on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
