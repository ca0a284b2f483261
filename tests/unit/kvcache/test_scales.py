"""Static scales of an FP8 cache."""

from __future__ import annotations

import pytest
import torch

from compress.kvcache.scales import ScaleRule, fake_quantize_fp8


def states(heads: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, heads, 25, 16, generator=generator)
    return x * torch.tensor([1.0, 10.0, 0.1])[:heads, None, None]


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_a_constant_has_its_448th_part_as_scale(strategy: str) -> None:
    scale = ScaleRule(strategy).scale_of(torch.full((2, 3, 4, 8), -7.0))
    assert scale.shape == ((1,) if strategy == "tensor" else (3, 1, 1))
    assert torch.equal(scale, torch.full_like(scale, 7.0) / 448)


def test_scales_a_head_are_the_heads_own() -> None:
    x = states()
    scale = ScaleRule("attn_head").scale_of(x)
    for head in range(3):
        assert scale[head].item() == pytest.approx(
            float(x[:, head].abs().max()) / 448, rel=1e-6
        )


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 100.0])
def test_percentile_is_a_nearest_rank(percentile: float) -> None:
    x = states()
    magnitudes = sorted(x.abs().flatten().tolist())
    rank = -(-len(magnitudes) * percentile // 100)
    expected = magnitudes[int(rank) - 1] / 448
    rule = ScaleRule(choice="percentile", percentile=percentile)
    assert rule.scale_of(x).item() == pytest.approx(expected, rel=1e-6)


def test_searched_scales_have_no_larger_error_than_others() -> None:
    x = states()
    x[0, 0, 0, 0] = 200.0  # an outlier that is worth clipping

    def error(scale: torch.Tensor) -> float:
        return float((fake_quantize_fp8(x, scale) - x).square().sum())

    plain = ScaleRule().scale_of(x)
    found = ScaleRule(choice="mse").scale_of(x)
    errors = [error(plain * share / 20) for share in range(10, 21)]
    assert error(found) == pytest.approx(min(errors), rel=1e-5)
    assert 0.5 * plain <= found * (1 + 1e-6) <= plain * (1 + 2e-6)


def test_rounding_is_within_a_sixteenth_and_clamps() -> None:
    x = states()
    scale = ScaleRule().scale_of(x)
    big = x.abs() > 2**-6 * scale  # normal numbers of E4M3
    error = (fake_quantize_fp8(x, scale) - x).abs() / x.abs()
    assert float(error[big].max()) <= 2**-4
    assert fake_quantize_fp8(10 * x, scale).abs().max() == 448 * scale


def test_rounding_equals_torch_casts() -> None:
    x, scale = states(), torch.tensor([0.013])
    cast = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(fake_quantize_fp8(x, scale), cast)


def test_zeros_have_a_scale_that_can_be_divided_by() -> None:
    scale = ScaleRule().scale_of(torch.zeros(1, 2, 3, 4))
    assert scale.item() > 0
    assert fake_quantize_fp8(torch.zeros(1, 2, 3, 4), scale).abs().max() == 0
