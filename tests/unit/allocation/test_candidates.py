"""Units, their choices, and bytes that equal those of the file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from allocation_fixtures import SCHEMES, candidates_of, quantizer
from gguf_fixtures import describe, random_state, save_tokenizer, tiny_config
from moe_fixtures import opened, save_mixture
from streaming_fixtures import model_of

from compress.allocation.candidates import Candidates, find_candidates
from compress.config.schema import QuantizeSection
from compress.core.artifact import ModelDescription
from compress.core.contracts import Exporter
from compress.core.errors import PlanError
from compress.export import vllm_rules
from compress.export.gguf import GGUFExporter
from compress.export.safetensors import SafetensorsExporter, SafetensorsOptions

VLLM = SafetensorsExporter(SafetensorsOptions(runtime="vllm"))
GGML = ("q4_0", "q5_0", "q8_0")


@pytest.fixture(scope="module")
def llama() -> ModelDescription:
    return model_of("llama")[1]


@pytest.fixture(scope="module")
def for_gguf(tmp_path_factory: pytest.TempPathFactory) -> ModelDescription:
    folder = tmp_path_factory.mktemp("assets")
    save_tokenizer(folder)
    config = tiny_config("llama")
    return describe(config, random_state(config), folder)


def random_assignments(found: Candidates, count: int = 10) -> list[list[int]]:
    chance = random.Random(0)
    drawn = [
        [chance.randrange(len(unit.options)) for unit in found.units]
        for _ in range(count)
    ]
    smallest = [0] * len(found.units)
    largest = [len(unit.options) - 1 for unit in found.units]
    return [smallest, largest, *drawn]


@pytest.mark.parametrize("format_name", ["gguf", "safetensors", "vllm"])
def test_bytes_are_those_of_the_exporters_file(
    llama: ModelDescription, for_gguf: ModelDescription, format_name: str
) -> None:
    exporter: Exporter
    if format_name == "gguf":
        exporter, model, schemes = GGUFExporter(), for_gguf, GGML
    else:
        exporter = VLLM if format_name == "vllm" else SafetensorsExporter()
        model, schemes = llama, SCHEMES
    scales = "float16" if format_name == "gguf" else "float32"
    found = candidates_of(model, exporter=exporter, schemes=schemes, scale_dtype=scales)
    for assignment in random_assignments(found):
        plan = found.plan(assignment)
        chosen = [u.options[i] for u, i in zip(found.units, assignment, strict=True)]
        sizes = exporter.tensor_bytes(plan, model)
        for option in chosen:
            assert option.bytes == sum(sizes[layer.name] for layer in option.layers)
        counted = found.fixed_bytes + sum(option.bytes for option in chosen)
        # Never below; above by what names of schemes and of the file may take.
        assert 0 <= counted - exporter.file_bytes(plan, model) <= 512


def test_options_are_sorted_and_cover_each_layer_once(llama: ModelDescription) -> None:
    found = candidates_of(llama)
    layers = [name for unit in found.units for name in unit.layers]
    assert set(llama.linears()) <= set(layers) and len(set(layers)) == len(layers)
    for unit in found.units:
        sizes = [option.bytes for option in unit.options]
        assert sizes == sorted(sizes)
        for option in unit.options:
            assert tuple(layer.name for layer in option.layers) == unit.layers


def test_vllm_keeps_fused_layers_together_and_every_plan_legal(
    llama: ModelDescription,
) -> None:
    found = candidates_of(llama, exporter=VLLM)
    leaves = {
        tuple(name.rpartition(".")[2] for name in unit.layers) for unit in found.units
    }
    assert ("q_proj", "k_proj", "v_proj") in leaves
    assert ("gate_proj", "up_proj") in leaves
    assert ("o_proj",) in leaves and ("down_proj",) in leaves
    for assignment in random_assignments(found):
        plan = found.plan(assignment)
        assert vllm_rules.problems(plan, llama) == []
        assert VLLM.check(plan, llama) == []


def test_what_vllm_has_no_kernel_for_is_left_out_and_said(
    llama: ModelDescription,
) -> None:
    found = candidates_of(llama, exporter=VLLM, schemes=("int4-g32", "fp4-g32"))
    names = {o.layers[0].scheme.name for u in found.units for o in u.options}
    assert names == {"int4-g32"}
    assert any("fp4-g32" in note for note in found.notes)


def test_a_pinned_layer_binds_those_that_are_fused_with_it(
    llama: ModelDescription,
) -> None:
    pin = {"re:.*q_proj": {"scheme": "int8-g32"}}
    found = candidates_of(llama, exporter=VLLM, overrides=pin)
    assert {name.rpartition(".")[2] for name in found.pinned} == {"q_proj"}
    bound = [unit for unit in found.units if "k_proj" in unit.layers[0]]
    assert len(bound) == llama.block_count
    for unit in bound:
        (only,) = unit.options
        assert {layer.scheme.name for layer in only.layers} == {"int8-g32"}


def test_what_is_fused_with_a_dense_layer_stays_dense_and_is_said(
    llama: ModelDescription,
) -> None:
    pin = {"re:.*layers\\.1\\..*up_proj": {"scheme": "dense"}}
    found = candidates_of(llama, exporter=VLLM, overrides=pin)
    layers = found.plan([0] * len(found.units)).layers
    assert "model.layers.1.mlp.gate_proj" not in layers
    assert "model.layers.0.mlp.gate_proj" in layers
    assert any("gate_proj: dense, as what it is bound to" in n for n in found.notes)


def test_pins_are_in_every_plan_and_dense_ones_in_none(llama: ModelDescription) -> None:
    pins = {
        "re:.*layers\\.0\\..*o_proj": {"scheme": "dense"},
        "re:.*down_proj": {"scheme": "int6-g32"},
    }
    found = candidates_of(llama, overrides=pins)
    for assignment in random_assignments(found, 3):
        layers = found.plan(assignment).layers
        assert "model.layers.0.self_attn.o_proj" not in layers
        down = [x.scheme.name for n, x in layers.items() if "down_proj" in n]
        assert down == ["int6-g32"] * llama.block_count


def test_experts_of_a_block_are_one_unit_in_gguf(tmp_path: Path) -> None:
    save_mixture(tmp_path, "mixtral")
    model = opened(tmp_path).description
    found = candidates_of(
        model, exporter=GGUFExporter(), schemes=GGML, scale_dtype="float16"
    )
    stacks = [unit for unit in found.units if "experts" in unit.layers[0]]
    assert {len(unit.layers) for unit in stacks} == {4}
    for unit in stacks:
        for option in unit.options:
            assert len({layer.scheme for layer in option.layers}) == 1
    for assignment in random_assignments(found, 4):
        assert GGUFExporter().check(found.plan(assignment), model) == []


def test_a_layer_with_no_choice_left_is_an_error(llama: ModelDescription) -> None:
    with pytest.raises(PlanError, match=r"allocate\.schemes.*none of int4-g128"):
        candidates_of(llama, schemes=("int4-g128",))


def test_nothing_to_choose_is_an_error(llama: ModelDescription) -> None:
    with pytest.raises(PlanError, match="every layer"):
        candidates_of(llama, method="rtn", overrides={"re:.*": {"scheme": "q8_0"}})


def test_two_formats_share_what_both_can_hold(for_gguf: ModelDescription) -> None:
    exporters: dict[str, Exporter] = {
        "gguf": GGUFExporter(),
        "safetensors": SafetensorsExporter(),
    }
    found = find_candidates(
        QuantizeSection(method="rtn"),
        for_gguf,
        ("q2_k", "q4_0", "q4_1", "q8_0"),
        exporters=exporters,
        budget_format="gguf",
        scale_dtype="float16",
        quantizer=quantizer,
    )
    names = {o.layers[0].scheme.name for u in found.units for o in u.options}
    assert names == {"int4-g32", "int8-g32"}
    assert not any("embed_tokens" in unit.layers[0] for unit in found.units)
    for assignment in random_assignments(found, 3):
        plan = found.plan(assignment)
        assert [e.check(plan, for_gguf) for e in exporters.values()] == [[], []]
