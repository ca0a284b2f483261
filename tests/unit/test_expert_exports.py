"""What a compressed-tensors checkpoint may hold of experts, and how it names them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from moe_fixtures import KINDS, expert_layer, opened, plan_of, save_mixture

from compress.config.plugins import create_quantizer
from compress.core.artifact import CompressedModel, ModelDescription
from compress.core.plan import LayerPlan, Plan
from compress.core.scheme import Scheme
from compress.export.experts import is_target, routers
from compress.export.hf_files import quantization_config
from compress.export.safetensors import SafetensorsExporter, SafetensorsOptions
from compress.exporting import same_codes
from compress.model.streaming import StreamedModel
from compress.transform import CompressedSource


@pytest.fixture(scope="module", params=KINDS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ModelDescription:
    folder = tmp_path_factory.mktemp(request.param)
    save_mixture(folder, request.param)
    return opened(folder).description


def full(model: ModelDescription) -> Plan:
    layers = {}
    for name in model.linears():
        rows, columns = model.tensors[f"{name}.weight"].shape
        scheme = Scheme.parse("int4-g32")
        layers[name] = LayerPlan(name, (rows, columns), "rtn", scheme)
    return Plan("tiny", layers)


def changed(plan: Plan, pattern: str, scheme: str | None) -> Plan:
    """Return the plan with the layers of a pattern in another scheme, or dense."""
    layers = {}
    for name, layer in plan.layers.items():
        if re.search(pattern, name) is None:
            layers[name] = layer
        elif scheme is not None:
            layers[name] = replace(layer, scheme=Scheme.parse(scheme))
    return Plan("tiny", layers)


def unread(plan: Plan, model: ModelDescription) -> CompressedModel:
    """Return an artifact for what asks for no weights."""
    return CompressedModel(model, plan, None, {}.__getitem__)  # type: ignore[arg-type]


def own(scheme: Scheme, model: ModelDescription) -> Scheme:
    """Return the scheme with scales in the model's type."""
    return scheme.with_scales(model.dtype)


def messages(plan: Plan, model: ModelDescription) -> list[str]:
    found = SafetensorsExporter().check(plan, model)
    return [f"{problem.where}: {problem.message}" for problem in found]


def test_one_scheme_for_all_experts_passes(model: ModelDescription) -> None:
    plan = full(model)
    assert messages(plan, model) == []
    assert messages(changed(plan, "self_attn", "int8-g32"), model) == []
    assert messages(changed(plan, "self_attn", None), model) == []
    assert messages(Plan("tiny", {}), model) == []


@pytest.mark.parametrize(
    ("pattern", "scheme", "words"),
    [
        (r"experts\.2\.", "int8-g32", "decodes all experts with one scheme"),
        (r"layers\.1\..*experts", "int8-g32", "decodes all experts with one scheme"),
        (r"experts\.3\.", None, "layers of experts stay dense"),
        (r"experts", None, "24 of 24 layers of experts stay dense"),
        (r".", "int4-g32-asym", "cannot decode experts with zero points"),
        (r"experts", "nvfp4", "drops the outer scales of experts"),
        (r"experts", "w8a8", "in the format int-quantized"),
        (r"experts", "mxfp8", "in the format mxfp8-quantized"),
        (r"experts", "fp8-g32", "a scale for each row or matrix only"),
    ],
)
def test_what_stock_transformers_cannot_open_is_refused(
    pattern: str, scheme: str | None, words: str, model: ModelDescription
) -> None:
    plan = changed(full(model), pattern, scheme)
    found = messages(plan, model)
    assert any(words in message and "set dense: true" in message for message in found)
    dense = SafetensorsExporter(SafetensorsOptions(dense=True))
    assert dense.check(plan, model) == []


def test_one_pattern_targets_the_experts_and_nothing_else(
    model: ModelDescription,
) -> None:
    plan = changed(full(model), "self_attn", "int8-g32")
    config = quantization_config(unread(plan, model), dense=False)
    targets = [group["targets"] for group in config["config_groups"].values()]
    patterns = [t for group in targets for t in group if t.startswith("re:")]
    assert len(patterns) == 1
    assert "experts" in patterns[0]  # how transformers finds the group
    covered = {n for n in model.linears() if is_target(n, patterns)}
    assert covered == {n for n in plan.layers if ".experts." in n}
    # vLLM asks by these names, whatever the checkpoint calls the matrices.
    assert model.family.experts is not None
    asked = f"{model.family.block(1)}.{model.family.experts.container}.0.gate_proj"
    assert is_target(asked, patterns)
    assert not any(is_target(name, patterns) for name in routers(model))
    assert set(routers(model)) <= set(config["ignore"])
    for router in routers(model):
        assert f"{router}.weight" in model.tensors


# Releases before leave out scales of experts that are multiplied together.
DECODED_SINCE = {"w4a8-g32": (5, 17), "fp8": (5, 21), "mxfp4": (5, 17)}


@pytest.mark.parametrize("scheme", DECODED_SINCE)
def test_what_transformers_decodes_of_experts_it_decodes_right(
    scheme: str, model: ModelDescription, tmp_path: Path
) -> None:
    assert model.assets is not None
    release = tuple(map(int, transformers.__version__.split(".")[:2]))
    if release < DECODED_SINCE[scheme]:
        pytest.skip(f"transformers {transformers.__version__} decodes it wrongly")
    source = opened(model.assets).source
    plan = changed(full(model), r"self_attn", None)
    plan = changed(plan, "experts", scheme)
    layers = plan.layers.items()
    plan = Plan("tiny", {n: replace(x, scheme=own(x.scheme, model)) for n, x in layers})
    rtn = create_quantizer("rtn", None)
    codes = {
        name: rtn.quantize(source.read(f"{name}.weight"), layer.scheme, None)
        for name, layer in plan.layers.items()
    }
    exporter = SafetensorsExporter()
    assert exporter.check(plan, model) == []
    exporter.write(CompressedModel(model, plan, source, codes.__getitem__), tmp_path)
    assert all(same_codes(exporter.read_codes(tmp_path, n), codes[n]) for n in codes)
    coded = StreamedModel(model, CompressedSource(source, plan, codes.__getitem__))
    tokens = torch.arange(16).view(2, 8)
    ours = torch.cat(list(coded.logits(tokens)))
    theirs = torch.cat(list(exporter.replay(tmp_path, tokens)))
    # Decoded weights are the same numbers; float32 sums run in another order.
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    dense = torch.cat(list(StreamedModel(model, source).logits(tokens)))
    assert not torch.allclose(ours, dense, rtol=1e-2, atol=1e-2)


def test_rounded_inputs_of_experts_are_noted(model: ModelDescription) -> None:
    exporter, words = SafetensorsExporter(), "never rounds their inputs"
    plan = changed(full(model), "experts", "w4a8-g32")
    assert any(words in " ".join(n.split()) for n in exporter.notes(plan, model))
    plan = changed(full(model), "self_attn", "w4a8-g32")
    assert not any(words in n for n in exporter.notes(plan, model))


def test_experts_of_odd_widths_are_noted(model: ModelDescription) -> None:
    exporter = SafetensorsExporter()
    odd = changed(full(model), "experts", "int3-g32")
    assert any("vLLM knows experts of 4" in n for n in exporter.notes(odd, model))
    vllm = SafetensorsExporter(SafetensorsOptions(runtime="vllm"))
    (problem,) = vllm.check(odd, model)
    assert "vLLM knows experts of 4" in problem.message
    assert ".experts." in problem.where
    assert vllm.check(full(model), model) == []
    assert exporter.notes(replace(full(model)), model) == tuple(
        note for note in exporter.notes(full(model), model) if "experts" not in note
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_plan_needs_no_groups(kind: str, tmp_path: Path) -> None:
    save_mixture(tmp_path, kind)
    handle = opened(tmp_path)
    plan = plan_of(handle, "rtn")
    assert expert_layer(kind, 0, 0, "down") in plan.layers
    exporter = SafetensorsExporter(SafetensorsOptions(dense=True))
    sizes = exporter.tensor_bytes(plan, handle.description)
    assert sum(sizes.values()) == sum(
        info.elements * 4 for info in handle.description.tensors.values()
    )
