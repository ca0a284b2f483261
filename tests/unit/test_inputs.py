"""Rounded inputs are the numbers of the specification, not merely close to them."""

from __future__ import annotations

import struct

import pytest
import torch

from compress.core.errors import SchemeError
from compress.core.inputs import fake_quantize_inputs, quantize_inputs
from compress.core.scheme import InputScheme


def inputs(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator) * 3


def float32(value: float) -> float:
    """Round a Python float to float32."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


@pytest.mark.parametrize(("grid", "most"), [("int8", 127), ("int6", 31), ("int4", 7)])
@pytest.mark.parametrize("group", [None, 8])
def test_integers_equal_a_loop_over_single_values(
    grid: str, most: int, group: int | None
) -> None:
    x = inputs(3, 24)
    levels, scale = quantize_inputs(x, InputScheme(grid, group))
    width = group or 24
    for row in range(3):
        for start in range(0, 24, width):
            values = x[row, start : start + width].tolist()
            amax = max(abs(v) for v in values)
            inverse = float32(most / amax)
            codes = [
                max(-most, min(most, round(float32(v * inverse)))) for v in values
            ]  # Python's round takes ties to even
            assert levels[row, start // width].tolist() == codes
            assert scale[row, start // width].item() == float32(amax / most)


def test_ties_go_to_even_and_the_least_code_is_never_used() -> None:
    x = torch.tensor([[-127.0, 0.5, 1.5, 2.5, -0.5, 126.5]])
    levels, scale = quantize_inputs(x, InputScheme("int8"))
    assert levels.flatten().tolist() == [-127, 0, 2, 2, 0, 126]
    assert scale.item() == 1.0


def test_zero_and_subnormal_rows_become_zeros() -> None:
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e-39), torch.ones(8)])
    levels, scale = quantize_inputs(x, InputScheme("int8"))
    assert scale.flatten().tolist() == [0.0, 0.0, float32(1 / 127)]
    assert levels[:2].abs().max() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "scheme",
    [InputScheme("int8"), InputScheme("e4m3"), InputScheme("e2m1", 4, two_level=True)],
)
def test_a_bad_value_spoils_its_own_run_only(bad: float, scheme: InputScheme) -> None:
    x = inputs(2, 8)
    x[0, 1] = bad
    rounded = fake_quantize_inputs(x, scheme, amax=10.0)
    width = scheme.group_size or 8
    assert rounded[0, :width].isnan().all()
    assert rounded[0, width:].isfinite().all()
    assert rounded[1].isfinite().all()


def test_fp8_equals_torch_casts_over_448() -> None:
    x = inputs(4, 32)
    amax = x.abs().amax(-1, keepdim=True)
    cast = (x * (448 / amax)).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    expected = cast * (amax / 448)
    assert torch.equal(fake_quantize_inputs(x, InputScheme("e4m3")), expected)


def test_nvfp4_equals_compressed_tensors() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import (
        calculate_qparams,
        generate_gparam,
    )

    x = inputs(4, 32)
    args = QuantizationArgs(
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        symmetric=True,
        dynamic="local",
        scale_dtype=torch.float8_e4m3fn,
        zp_dtype=torch.float8_e4m3fn,
    )
    outer = generate_gparam(x.min(), x.max())
    groups = x.unflatten(-1, (2, 16))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, outer)
    expected = fake_quantize(x, scale, zero, args, global_scale=outer)
    scheme = InputScheme("e2m1", 16, two_level=True)
    ours = fake_quantize_inputs(x, scheme, amax=float(x.abs().max()))
    # The library multiplies by 1/G where we divide by G: one float32 rounding apart,
    # and a value that lies on a tie within that may fall to either side.
    same = torch.isclose(ours, expected, rtol=1e-6, atol=0)
    assert same.float().mean() > 0.99


def test_skewed_inputs_lose_less_in_fp8_than_in_integers() -> None:
    x = inputs(64, 128).relu() ** 4  # ZeroQuant-FP's case: a few large values

    def error(grid: str) -> float:
        rounded = fake_quantize_inputs(x, InputScheme(grid))
        return float(((rounded - x)[x > 0] / x[x > 0]).square().mean())

    assert error("e4m3") < error("int8")


def test_type_and_shape_are_kept() -> None:
    x = inputs(2, 3, 16).bfloat16()
    rounded = fake_quantize_inputs(x, InputScheme("int8", 8))
    assert rounded.dtype == torch.bfloat16
    assert rounded.shape == x.shape


def test_groups_that_do_not_divide_are_named() -> None:
    with pytest.raises(SchemeError, match="groups of 7 inputs do not divide 16"):
        quantize_inputs(inputs(1, 16), InputScheme("int8", 7))


def test_two_levels_need_calibration() -> None:
    with pytest.raises(SchemeError, match="none was measured"):
        quantize_inputs(inputs(1, 16), InputScheme("e2m1", 16, two_level=True))


def test_the_inverse_is_a_division_of_its_own() -> None:
    # 127 / amax and 127 * (1 / amax) differ in the last bit for one number in four.
    generator = torch.Generator().manual_seed(1)
    amax = torch.rand(4000, generator=generator) + 0.5
    halves = torch.randint(0, 126, (4000,), generator=generator) + 0.5
    values = halves * amax / 127  # near ties, where the last bit decides
    levels, _ = quantize_inputs(torch.stack([amax, values], 1), InputScheme("int8"))
    level = torch.full_like(amax, 127.0)
    assert torch.equal(levels[:, 0, 1], (values * (level / amax)).round())
    assert not torch.equal(
        levels[:, 0, 1], (values * (amax.reciprocal() * 127)).round()
    )
