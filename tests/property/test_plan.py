"""Plans and schemes survive being written and read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.core.errors import PlanError, SchemeError
from compress.core.plan import LayerPlan, Plan
from compress.core.scheme import Scheme, Zero

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    zero = draw(st.sampled_from(Zero))
    bits = draw(st.integers(2, 7 if zero is Zero.OFFSET else 8))
    group = draw(st.none() | st.integers(1, 4096))
    storage = draw(st.sampled_from(["float16", "bfloat16", "float32"]))
    return Scheme(bits, group, zero, storage)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    sides = st.integers(1, 1 << 20)
    layers = {
        name: LayerPlan(
            name, (draw(sides), draw(sides)), draw(st.text()), draw(schemes())
        )
        for name in draw(st.lists(NAMES, max_size=5, unique=True))
    }
    return Plan(draw(st.text()), layers)


@given(plans())
def test_a_plan_is_read_back_as_it_was_written(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert list(again.layers) == list(plan.layers)


@given(schemes())
def test_a_scheme_is_its_name_and_storage(scheme: Scheme) -> None:
    assert Scheme.parse(scheme.name).with_scales(scheme.scale_dtype) == scheme
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


@given(schemes(), st.integers(1, 64))
def test_bits_per_weight_count_every_stored_bit(scheme: Scheme, groups: int) -> None:
    columns = (scheme.group_size or 32) * groups
    stored = columns // scheme.group_of(columns)
    scale = 32 if scheme.scale_dtype == "float32" else 16
    zero = {Zero.NONE: 0, Zero.INTEGER: scheme.bits, Zero.OFFSET: scale}[scheme.zero]
    bits = columns * scheme.bits + stored * (scale + zero)
    assert scheme.bits_per_weight(columns) == pytest.approx(bits / columns)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 2, "model": "m", "layers": {}}', '{"version": 1}']
    + ['{"version": 1, "model": "m", "layers": {"a": {"shape": [1]}}}'],
)
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="plan"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    "name",
    [
        "int4-g0",
        "int9",
        "int8-g32-offset",
        "fp5",
        "fp4-g0",
        "w6a7",
        "int4-lorc0",
        "nvfp4+q",
        "",
    ],
)
def test_names_of_no_scheme_are_refused(name: str) -> None:
    with pytest.raises(SchemeError):
        Scheme.parse(name)
