"""From a config to a plan: what is chosen, and what is refused with which words."""

from __future__ import annotations

from typing import Any

import pytest
from export_fixtures import tiny_llama

from compress.config.schema import QuantizeSection
from compress.core.artifact import ModelDescription
from compress.core.contracts import Quantizer
from compress.core.errors import CheckpointError, ConfigError, PlanError
from compress.core.plan import Plan
from compress.core.scheme import Scheme
from compress.planning.planner import make_plan, resolve_scale_dtype
from compress.quantizers.gptq import GPTQ
from compress.quantizers.rtn import RoundToNearest


class EvenBits(RoundToNearest):
    """Refuses odd widths."""

    def supports(self, scheme: Scheme) -> bool:
        return scheme.bits % 2 == 0


def plan_of(
    section: dict[str, Any] | None,
    model: ModelDescription | None = None,
    quantizer: type[Quantizer] = RoundToNearest,
) -> Plan:
    checked = None if section is None else QuantizeSection.model_validate(section)
    return make_plan(
        checked,
        model or tiny_llama()[1],
        scale_dtype="float16",
        quantizer=lambda _: quantizer(),
    )


def section(scheme: str = "int4-g32", **overrides: Any) -> dict[str, Any]:
    return {"method": "rtn", "scheme": scheme, "overrides": overrides}


def test_every_linear_of_every_block_is_in_the_plan() -> None:
    _, model = tiny_llama()
    plan = plan_of(section(), model)
    assert list(plan.layers) == model.linears()
    layer = plan.layers["model.layers.1.mlp.down_proj"]
    assert (layer.shape, layer.method) == ((64, 128), "rtn")
    assert layer.scheme == Scheme.parse("int4-g32").with_scales("float16")


def test_without_a_section_nothing_is_planned() -> None:
    assert plan_of(None).layers == {}


def test_the_first_override_that_names_a_layer_wins() -> None:
    plan = plan_of(
        {
            "scheme": "int4-g32",
            "overrides": {
                "model.layers.0.mlp.up_proj": {"scheme": "int8"},
                r"re:.*\.mlp\..*": {"scheme": "int6-g64", "method": "rtn"},
                r"re:model\.layers\.1\.self_attn\.": {"scheme": "dense"},
            },
        }
    )
    assert plan.layers["model.layers.0.mlp.up_proj"].scheme.name == "int8"
    down = plan.layers["model.layers.0.mlp.down_proj"]
    assert (down.scheme.name, down.method) == ("int6-g64", "rtn")
    query = plan.layers["model.layers.0.self_attn.q_proj"]
    assert (query.scheme.name, query.method) == ("int4-g32", "gptq")
    assert not [n for n in plan.layers if n.startswith("model.layers.1.self_attn")]


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_planned_when_they_are_named(tied: bool) -> None:
    overrides = {"model.embed_tokens": {"scheme": "q8_0"}}
    if not tied:
        overrides["lm_head"] = {"scheme": "int6-g32"}
    plan = plan_of(section(**overrides), tiny_llama(tied=tied)[1])
    assert plan.layers["model.embed_tokens"].scheme.name == "int8-g32"
    assert ("lm_head" in plan.layers) != tied


def test_the_embedding_takes_the_method_of_the_plan() -> None:
    overrides = {"model.embed_tokens": {"scheme": "q8_0"}}
    found = plan_of({**section(**overrides), "method": "gptq"}, quantizer=GPTQ)
    assert found.layers["model.embed_tokens"].method == "gptq"


def test_a_tied_head_cannot_be_named() -> None:
    with pytest.raises(PlanError, match="quantize.overrides.lm_head: no layer has"):
        plan_of(section(lm_head={"scheme": "int8"}), tiny_llama(tied=True)[1])


def test_a_group_that_does_not_divide_names_layer_and_sizes() -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(section("int4-g96"))
    assert str(caught.value).splitlines() == [
        "group_size 96 does not divide the 64 columns of "
        "model.layers.0.self_attn.q_proj; use 16 or 32 or 64, or one scale a row (int4)"
        " (and 1 more layers)",
        *[
            f"group_size 96 does not divide the 64 columns of model.layers.0.{path}; "
            "use 16 or 32 or 64, or one scale a row (int4) (and 1 more layers)"
            for path in (
                "self_attn.k_proj",
                "self_attn.v_proj",
                "self_attn.o_proj",
                "mlp.gate_proj",
                "mlp.up_proj",
            )
        ],
        "group_size 96 does not divide the 128 columns of "
        "model.layers.0.mlp.down_proj; use 16 or 32 or 64 or 128, or one scale a row "
        "(int4) (and 1 more layers)",
    ]


def test_an_override_that_matches_nothing_is_refused() -> None:
    wrong = {"model.layers.0.mlp.upproj": {"scheme": "dense"}}
    with pytest.raises(PlanError) as caught:
        plan_of(section(**wrong))
    assert str(caught.value) == (
        "quantize.overrides.model.layers.0.mlp.upproj: no layer has this name; layers "
        "are named like model.layers.0.self_attn.q_proj"
    )


def test_all_problems_come_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(section("int4-g96", nothing={"scheme": "dense"}))
    message = str(caught.value)
    assert "does not divide" in message
    assert "overrides.nothing" in message


def test_a_scheme_that_the_method_cannot_make_is_refused() -> None:
    with pytest.raises(
        PlanError, match="rtn cannot make int3-g32; use one of int8-g32"
    ):
        plan_of(section("int3-g32"), quantizer=EvenBits)


def test_a_missing_matrix_is_refused() -> None:
    _, model = tiny_llama()
    del model.tensors["model.layers.1.mlp.up_proj.weight"]  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"1\.mlp\.up_proj\.weight is missing"):
        plan_of(section(), model)


@pytest.mark.parametrize(
    ("chosen", "formats", "expected"),
    [
        ("auto", ["safetensors"], "bfloat16"),
        ("auto", ["safetensors", "gguf"], "float16"),
        ("float32", ["safetensors"], "float32"),
        ("float16", ["gguf"], "float16"),
    ],
)
def test_scales_are_stored_as_the_formats_want(
    chosen: str, formats: list[str], expected: str
) -> None:
    config = QuantizeSection.model_validate(
        {"scheme": "int4-g32", "scale_dtype": chosen}
    )
    _, model = tiny_llama(dtype="bfloat16")
    assert resolve_scale_dtype(config, model, formats) == expected


def test_gguf_refuses_other_scales() -> None:
    config = QuantizeSection.model_validate(
        {"scheme": "int4-g32", "scale_dtype": "bfloat16"}
    )
    with pytest.raises(ConfigError, match="bfloat16 cannot be stored in GGUF"):
        resolve_scale_dtype(config, tiny_llama()[1], ["gguf"])
