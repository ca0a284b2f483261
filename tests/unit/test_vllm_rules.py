"""What is asked of a plan when vLLM has to load it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from export_fixtures import linears, make_artifact

from compress.core.errors import ExportError
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.export.outer_scales import OuterScales
from compress.export.safetensors import SafetensorsExporter, SafetensorsOptions
from compress.export.vllm_rules import obstacle

FOR_VLLM = SafetensorsExporter(SafetensorsOptions(runtime="vllm"))


@pytest.mark.parametrize(
    "name",
    [
        *("int4-g128", "int8", "int3-g64", "int4-g128-asym", "w8a8", "w6a8-g128"),
        *("w6a8-g128-group", "w4a8-g128", "w4afp8-g128", "fp8", "fp8-w8a8"),
        *("fp8-block", "fp8-tensor", "nvfp4", "nvfp4-w4a4", "mxfp4", "mxfp8"),
    ],
)
def test_schemes_with_a_kernel_pass(name: str) -> None:
    assert obstacle(Scheme.parse(name)) is None


@pytest.mark.parametrize(
    "name",
    [
        *("fp4-g32", "w4a8-fp-g128", "fp4-g128-pow2", "fp8-g64", "w4afp8-g64"),
        *("int3-g128-asym", "w4a8-g128-asym", "int4-g128+int6", "fp8+int8"),
        *("mxfp8+e4m3-g32", "fp8-b64"),
    ],
)
def test_schemes_that_only_transformers_loads_are_told_apart(name: str) -> None:
    found = obstacle(Scheme.parse(name))
    assert found is not None
    assert f"no kernel takes {Scheme.parse(name).name}" in found


def test_fused_layers_of_two_schemes_are_a_problem_for_vllm_only() -> None:
    def uneven(layer: str) -> str | None:
        return "int8-g32" if "q_proj" in layer else linears("int4-g32")(layer)

    artifact = make_artifact(uneven)
    plan, model = artifact.plan, artifact.description
    assert SafetensorsExporter().check(plan, model) == []
    first, second = FOR_VLLM.check(plan, model)  # one a block
    assert first.where == "model.layers.0.self_attn.q_proj"
    assert "q_proj, self_attn.k_proj, self_attn.v_proj" in first.message
    assert "(int8-g32, int4-g32, int4-g32)" in first.message
    assert second.where.startswith("model.layers.1.")


def test_a_dense_layer_among_fused_ones_is_a_problem() -> None:
    artifact = make_artifact(
        lambda n: None if "up_proj" in n else linears("int4-g32")(n)
    )
    problem, *_ = FOR_VLLM.check(artifact.plan, artifact.description)
    assert "(int4-g32, dense)" in problem.message


def test_blocks_that_straddle_fused_layers_are_a_problem() -> None:
    # 128 wide with 2 of 4 heads for keys: k and v have 64 rows.
    artifact = make_artifact(linears("fp8-block"), hidden=128)
    found = FOR_VLLM.check(artifact.plan, artifact.description)
    assert {problem.where.rpartition(".")[2] for problem in found} == {
        "k_proj",
        "v_proj",
    }
    assert "a multiple of 128 rows" in found[0].message


def test_an_even_plan_has_no_problem() -> None:
    artifact = make_artifact(linears("w6a8-g32"))
    assert FOR_VLLM.check(artifact.plan, artifact.description) == []


def test_notes_say_what_vllm_does_not_load() -> None:
    artifact = make_artifact(linears("fp4-g32"), dtype="bfloat16")
    notes = SafetensorsExporter().notes(artifact.plan, artifact.description)
    assert any("vLLM: no kernel takes fp4-g32" in note for note in notes)


def _two_level(value: float) -> QuantizedTensor:
    return QuantizedTensor(
        torch.zeros(2, 16, dtype=torch.uint8),
        torch.ones(2, 1).to(torch.float8_e4m3fn),
        None,
        Scheme.parse("nvfp4"),
        outer=torch.tensor([value]),
    )


def test_outer_scales_of_fused_layers_are_compared() -> None:
    model = make_artifact(linears("nvfp4")).description
    block = "model.layers.0.self_attn"
    seen = OuterScales(model, strict=False)
    seen.see(f"{block}.q_proj", _two_level(5.0))
    seen.see(f"{block}.k_proj", _two_level(5.0))
    seen.see(f"{block}.o_proj", _two_level(7.0))  # has an input of its own
    assert seen.notes() == ()
    seen.see(f"{block}.v_proj", _two_level(6.0))
    (note,) = seen.notes()
    assert f"{block}.q_proj and {block}.v_proj have outer scales 5 and 6" in note


def test_outer_scales_that_differ_stop_an_export_for_vllm() -> None:
    seen = OuterScales(make_artifact(linears("nvfp4")).description, strict=True)
    seen.see("model.layers.0.mlp.gate_proj", _two_level(5.0))
    with pytest.raises(ExportError, match="vLLM fuses them and keeps one"):
        seen.see("model.layers.0.mlp.up_proj", _two_level(6.0))


def test_inputs_that_were_not_measured_stop_an_export_before_writing(tmp_path) -> None:
    artifact = replace(make_artifact(linears("nvfp4-w4a4")), input_amax={})
    with pytest.raises(ExportError, match=r"q_proj \(and 13 more\)"):
        SafetensorsExporter().write(artifact, tmp_path)
    assert list(tmp_path.iterdir()) == []
