"""A recorded loop, and factors in batches, give what the GPU gives without them."""

import logging

import pytest
import torch

from compress.core import feedback, replay
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.quantizers.gptq import GPTQ, GPTQOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SCHEMES = ["int4-g64", "int3-g64-asym", "int4-g32-offset", "fp8", "fp4-g64-pow2"]
SCHEMES += ["nvfp4", "mxfp4", "mxfp6", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_nl"]


def case(rows, columns, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    inputs = torch.randn(2 * columns, columns, generator=generator, device="cuda")
    weight = torch.randn(rows, columns, generator=generator, device="cuda")
    return weight, LayerStatistics(
        2 * inputs.T @ inputs, 2 * columns, inputs.T @ inputs
    )


def coded(scheme, cases):
    weights, statistics = zip(*cases, strict=True)
    grid = Scheme.parse(scheme).with_scales("bfloat16")
    return GPTQ(GPTQOptions(refit=1)).quantize_alike(weights, grid, statistics)


def same(a, b):
    return torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_recorded_loops_give_the_same_codes(scheme, monkeypatch, caplog):
    cases = [case(192, 768, seed) for seed in (1, 2)]
    replay.forget()
    with caplog.at_level(logging.WARNING):
        recorded = [coded(scheme, [one])[0] for one in cases]
    assert not caplog.records
    assert any(one is not None for one in replay._recordings.values())
    monkeypatch.setattr(replay, "run", lambda step, about, given: step(about, *given))
    plain = [coded(scheme, [one])[0] for one in cases]
    assert all(map(same, recorded, plain))


def test_codes_and_factors_do_not_depend_on_what_lies_beside():
    cases = [case(96, 256, seed) for seed in range(20)]
    alone = [coded("int4-g64", [one])[0] for one in cases]
    assert all(map(same, alone, coded("int4-g64", cases)))
    hessians = [statistics.hessian for _, statistics in cases]
    order = torch.arange(256, device="cuda")
    together = feedback.inverse_factors(hessians, [order] * len(hessians))
    for hessian, factor in zip(hessians, together, strict=True):
        assert torch.equal(feedback.inverse_factor(hessian, order), factor)


def test_old_recordings_make_room(monkeypatch):
    replay.forget()
    monkeypatch.setattr(replay, "_KEPT_BYTES", 1)
    for rows in (64, 128):
        coded("int4-g64", [case(rows, 512, 0)])
    kept = [one for one in replay._recordings.values() if one is not None]
    assert len(kept) == 1
