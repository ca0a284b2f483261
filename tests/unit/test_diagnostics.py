"""Places, names and hints in messages about a config."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML

from compress.config.diagnostics import (
    Assignment,
    Findings,
    Origin,
    describe,
    known_keys,
    path_text,
    suggest,
)
from compress.core.errors import ConfigError

TEXT = "a:\n  b: [1, {c: 2}]\n"


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    depth: int = 0


class Outer(BaseModel):
    inner: Inner | None = None
    many: list[Inner] = []
    named: dict[str, Inner] = {}


@pytest.fixture
def origin() -> Origin:
    return Origin("x.yaml", YAML(typ="safe", pure=True).compose(TEXT))


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (("a",), (1, 1, "x.yaml:1:1")),
        (("a", "b"), (2, 3, "x.yaml:2:3")),
        (("a", "b", 1), (2, 10, "x.yaml:2:10")),
        (("a", "b", 1, "c"), (2, 11, "x.yaml:2:11")),
        (("a", "missing", "deep"), (1, 1, "x.yaml:1:1")),
        (("a", "b", 9), (2, 3, "x.yaml:2:3")),
        ((), (1, 1, "x.yaml:1:1")),
    ],
)
def test_path_is_located_at_its_key(
    origin: Origin, path: tuple[str | int, ...], place: tuple[int, int, str]
) -> None:
    assert origin.locate(path) == place


def test_last_assignment_covers_what_is_below_it() -> None:
    first = Assignment(("a",), {}, "a={}")
    last = Assignment(("a", "b"), 1, "a.b=1")
    origin = Origin("", None, (first, last))
    assert origin.locate(("a", "b", "c"))[2] == "--set a.b=1"
    assert origin.locate(("a", "x"))[2] == "--set a={}"


def test_keys_with_dots_are_quoted() -> None:
    assert path_text(("a", "b.c", 0)) == 'a."b.c".0'


def test_suggest_gives_the_nearest_or_all() -> None:
    assert suggest("group_sise", ["group_size", "seed"]) == (
        "; did you mean 'group_size'?"
    )
    assert suggest("zzz", ["b", "a"]) == "; known: a, b"
    assert suggest("zzz", []) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true (true or false)"),
        (None, "nothing"),
        ("x", "'x' (text)"),
        (1.5, "1.5 (a number)"),
    ],
)
def test_values_are_named_in_words_of_yaml(value: object, text: str) -> None:
    assert describe(value) == text


def test_long_values_are_cut() -> None:
    assert len(describe("x" * 1000)) < 60


@pytest.mark.parametrize("path", [("inner",), ("many", 3), ("named", "any")])
def test_known_keys_are_found_through_unions_lists_and_maps(
    path: tuple[str | int, ...],
) -> None:
    assert known_keys(Outer.model_json_schema(), path) == ["depth"]


def test_findings_are_prefixed_unique_and_sorted(origin: Origin) -> None:
    findings = Findings(origin)
    findings.add(("a", "b"), "second")
    findings.add(("a", "b"), "second")
    findings.add(("a",), "first")
    with pytest.raises(ConfigError) as caught:
        findings.raise_any()
    assert str(caught.value).splitlines() == [
        "x.yaml:1:1: a: first",
        "x.yaml:2:3: a.b: second",
    ]


def test_validation_errors_get_the_prefix() -> None:
    findings = Findings(Origin())
    try:
        Outer.model_validate({"many": [{"dept": 1}]})
    except ValidationError as error:
        findings.add_validation(error, Outer.model_json_schema(), ("options",))
    with pytest.raises(ConfigError) as caught:
        findings.raise_any()
    assert str(caught.value) == (
        "options.many.0.dept: unknown key; did you mean 'depth'?"
    )


def test_no_findings_raise_nothing() -> None:
    Findings(Origin()).raise_any()
