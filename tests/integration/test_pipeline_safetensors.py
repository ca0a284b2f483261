"""Whole runs to safetensors with schemes beyond weights in integers."""

from __future__ import annotations

import pytest
from pipeline_fixtures import Ground, call, report_of

import compress
from compress.core.errors import PlanError

pytest.importorskip("compressed_tensors")
VERIFIED = {"verify": True, "threads": 1}


@pytest.mark.parametrize(
    ("scheme", "rounds_inputs"),
    [("fp8-w8a8", True), ("nvfp4", False), ("nvfp4-w4a4", True)],
)
def test_a_run_is_verified_with_and_without_rounded_inputs(
    scheme: str, rounds_inputs: bool, ground: Ground
) -> None:
    done = ground.run(
        f"ct-{scheme}",
        quantize={"method": "gptq", "scheme": scheme},
        run={**VERIFIED, "workdir": str(ground.folder / f"ct-{scheme}")},
    )
    entry = report_of(done)["exports"]["safetensors"]
    assert entry["codes"] == {"layers": 14, "identical": True}
    assert entry["verify"]["passed"]
    # nvfp4 is decoded to bfloat16 by the library, the model in memory is not.
    assert entry["verify"]["kl"] < 1e-4
    assert ("kl_as_served" in entry["verify"]) == rounds_inputs
    listed = call("inspect", done)
    assert listed.exit_code == 0
    assert scheme in listed.output


def test_a_scheme_without_a_layout_runs_only_dense(ground: Ground) -> None:
    quantize = {"method": "rtn", "scheme": "e3m0-g32"}
    with pytest.raises(PlanError, match="dense: true"):
        compress.plan(ground.config("ct-e3m0", quantize=quantize))
    done = ground.run(
        "ct-e3m0-dense",
        quantize=quantize,
        export=[{"format": "safetensors", "dense": True}],
        run={**VERIFIED, "workdir": str(ground.folder / "ct-e3m0-dense")},
    )
    entry = report_of(done)["exports"]["safetensors"]
    assert "codes" not in entry
    assert entry["verify"]["passed"]
    assert report_of(done)["bits_per_weight"]["safetensors"] > 15


def test_a_plan_that_vllm_would_refuse_is_refused_at_once(ground: Ground) -> None:
    config = ground.config(
        "ct-vllm",
        quantize={
            "method": "rtn",
            "scheme": "int4-g32",
            "overrides": {"re:.*k_proj": {"scheme": "int8-g32"}},
        },
        export=[{"format": "safetensors", "runtime": "vllm"}],
    )
    with pytest.raises(PlanError, match=r"vLLM fuses .*k_proj.* different schemes"):
        compress.plan(config)
