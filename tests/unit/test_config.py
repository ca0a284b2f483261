"""Loading of configs: defaults, positions, all errors at once, ``--set``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compress.config import Config, config_schema, load_config, parse_options
from compress.core.errors import ConfigError

MINIMAL = "model: {path: some/folder}\n"


def write(folder: Path, text: str | bytes) -> str:
    path = folder / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def error_of(source: Any, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return str(caught.value)


def error_in(folder: Path, text: str | bytes, *overrides: str) -> str:
    """The error of a file, without the folder in front."""
    return error_of(write(folder, text), *overrides).replace(f"{folder}/", "")


def test_only_model_is_required(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.model.path == "some/folder"
    assert (config.quantize, config.evaluate, config.export) == (None, None, ())
    assert (config.calibration.data, config.calibration.samples) == ("mix", 128)
    assert config.run.max_kl == 1e-3


def test_binding_names_of_the_architecture_are_understood() -> None:
    config = load_config(
        {
            "model": {"path": "builtin:smollm2-135m", "dtype": "auto"},
            "calibration": {"data": [{"source": "mix"}, {"source": "a", "weight": 2}]},
            "quantize": {
                "method": "rtn",
                "scheme": "int4-g64",
                "options": {},
                "overrides": {"re:.*down_proj": {"scheme": "int8-g64"}},
            },
            "evaluate": {"perplexity": ["wikitext2"], "kl": True},
            "run": {"workdir": "runs/x", "device": "auto", "seed": 0},
        }
    )
    assert config.quantize is not None
    assert config.quantize.overrides["re:.*down_proj"].scheme == "int8-g64"
    assert isinstance(config.calibration.data, tuple)
    assert [s.weight for s in config.calibration.data] == [1.0, 2]


def test_config_survives_a_round_trip_through_plain_data() -> None:
    config = load_config(
        {
            "model": {"path": "m"},
            "quantize": {"method": "rtn", "scheme": "q4_0"},
            "evaluate": {},
        },
        ["run.threads=2"],
    )
    assert load_config(config.model_dump(mode="json")) == config


def test_config_is_frozen() -> None:
    config = load_config({"model": {"path": "m"}})
    with pytest.raises(ValidationError):
        config.run.seed = 1  # type: ignore[misc]


def test_python_paths_are_accepted(tmp_path: Path) -> None:
    config = load_config({"model": {"path": tmp_path}, "run": {"workdir": tmp_path}})
    assert config.model.path == str(tmp_path)
    assert config.run.workdir == tmp_path


def test_options_are_checked_by_the_plugin_with_position(tmp_path: Path) -> None:
    text = MINIMAL + (
        "quantize:\n  method: rtn\n  scheme: int4-g64\n  options:\n    serch: true\n"
    )
    assert error_in(tmp_path, text) == (
        "run.yaml:6:5: quantize.options.serch: unknown key; did you mean 'search'?"
    )


def test_all_errors_are_told_at_once_in_file_order(tmp_path: Path) -> None:
    text = (
        "model: {path: x, dtyp: auto}\n"
        "calibration: {samples: lots}\n"
        "quantize: {method: rtm, scheme: int9}\n"
        "run:\n  sed: 1\n"
    )
    lines = error_in(tmp_path, text).splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["run.yaml:1:18", "model.dtyp"],
        ["run.yaml:2:15", "calibration.samples"],
        ["run.yaml:3:12", "quantize.method"],
        ["run.yaml:3:25", "quantize.scheme"],
        ["run.yaml:5:3", "run.sed"],
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: {seed: '1'}", "run.seed: expected a whole number, got '1' (text)"),
        ("run: {verify: 1}", "run.verify: expected true or false, got 1 (a number)"),
        ("run: {verify: no}", "expected true or false, got 'no' (text)"),
        ("run: 3", "run: expected keys and values, got 3 (a number)"),
        ("run: {device: gpu}", "'gpu' (text) is not one of: auto, cpu, mps, cuda"),
        ("run: {max_kl: 0}", "greater than 0, got 0"),
        ("evaluate: {protocol: hf204}", "did you mean 'hf2048'?"),
        ("evaluate: {perplexity: wikitext2}", "expected a list, got 'wikitext2'"),
        ("calibration: {data: 3}", "calibration.data: expected text, got 3"),
        ("calibration: {data: []}", "calibration.data: the list is empty"),
        ("calibration: {data: [{}]}", "calibration.data.0.source: required key"),
        ("quantize: {method: rtn}", "2:1: quantize.scheme: required key is missing"),
        ("quantize: {method: rtn, scheme: dense}", "under quantize.overrides"),
        ("export: [{}]", "2:10: export.0.format: required key is missing"),
        ("export: [3]", "2:10: export.0: expected keys and values, got 3"),
        ("export: [{format: safetensor}]", "did you mean 'safetensors'?"),
        (
            "export: [{format: safetensors, max_shard_siz: 1}]",
            "2:32: export.0.max_shard_siz: unknown key; did you mean 'max_shard_size'?",
        ),
        (
            "export: [{format: safetensors}, {format: safetensors}]",
            "2:34: export.1.format: 'safetensors' is also export.0",
        ),
        ("prun: {}", "2:1: prun: unknown key; did you mean 'prune'?"),
        ("alocate: {}", "2:1: alocate: unknown key"),
    ],
)
def test_wrong_value_is_explained(tmp_path: Path, text: str, expected: str) -> None:
    message = error_in(tmp_path, MINIMAL + text)
    assert expected in message
    assert message.startswith("run.yaml:2:")
    assert len(message.splitlines()) == 1


def test_missing_model_is_an_error(tmp_path: Path) -> None:
    expected = "run.yaml:1:1: model: required key is missing"
    assert error_in(tmp_path, "run: {seed: 1}") == expected


def test_bad_regex_of_an_override_has_both_positions(tmp_path: Path) -> None:
    text = MINIMAL + (
        'quantize:\n  method: rtn\n  scheme: int4-g32\n  overrides:\n    "re:a(b": '
        "{scheme: dense}\n"
    )
    message = error_in(tmp_path, text)
    assert message.startswith("run.yaml:6:5: quantize.overrides.re:a(b: ")
    assert "at character 2 of 'a(b'" in message


def test_empty_override_is_an_error(tmp_path: Path) -> None:
    text = MINIMAL + "quantize: {method: rtn, scheme: int4, overrides: {a: {}}}"
    assert "needs scheme, method or both" in error_in(tmp_path, text)


def test_method_of_an_override_is_checked() -> None:
    message = error_of(
        {
            "model": {"path": "m"},
            "quantize": {
                "method": "rtn",
                "scheme": "int4-g32",
                "overrides": {"model.layers.0.mlp.up_proj": {"method": "rtnn"}},
            },
        }
    )
    assert message.startswith(
        'quantize.overrides."model.layers.0.mlp.up_proj".method: unknown quantizer'
    )
    assert "did you mean 'rtn'?" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "run.yaml:1:1: the file is empty"),
        (b"# only a comment\n", "run.yaml:1:1: the file is empty"),
        (b"- a\n", "run.yaml:1:1: expected keys and values, got ['a'] (a list)"),
        (b"model: {path: x\nrun: {}\n", "run.yaml:2:4: not YAML: "),
        (b"model:\n\tpath: x\n", "run.yaml:2:1: not YAML: "),
        (b"model: {}\n---\nrun: {}\n", "run.yaml:2:1: not YAML: expected a single"),
        (b"model: *x\n", "run.yaml:1:8: not YAML: found undefined alias"),
        (b"model:\n  path: \x01\n", "run.yaml:2:9: not YAML: control character"),
        (b"model:\n  path: caf\xe9\n", "run.yaml:2:12: not UTF-8 text (byte 0xe9)"),
        (b"[" * 5000, "run.yaml: not YAML: RecursionError"),
    ],
)
def test_unreadable_file_is_one_clear_line(
    tmp_path: Path, text: bytes, expected: str
) -> None:
    message = error_in(tmp_path, text)
    assert message.startswith(expected)
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: {seed: 1}\nrun: {seed: 2}", "3:1: run: the same key was given at 2:1"),
        ("run: {seed: 1, seed: 2}", "2:16: run.seed: the same key was given at 2:7"),
        ("run: {1: x}", "2:7: run: a key is text; put '1' in quotes"),
        ("run: !x {}", "2:6: run: tag !x is not supported"),
        ("run: {seed: !x 3}", "2:13: run.seed: tag !x is not supported"),
        ("run: {seed: !!int x}", "2:13: run.seed: 'x' cannot be read as int"),
        ("run: &a {<<: *a}", "2:10: run: merge keys are not supported"),
        ("export: &a [*a]", "2:9: export.0: an alias refers to itself"),
    ],
)
def test_odd_yaml_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    message = error_in(tmp_path, MINIMAL + text)
    assert expected in message


def test_numbers_and_words_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, "model: {path: no}\nrun: {max_kl: 1e-4, seed: 0o17}\n")
    )
    assert (config.model.path, config.run.max_kl, config.run.seed) == ("no", 1e-4, 15)


def test_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbfmodel:\r\n  path: x\r\n"
    assert load_config(write(tmp_path, text)).model.path == "x"


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    assert error_of(str(tmp_path / "no.yaml")).endswith(
        "no.yaml: no such file; give the path of a config"
    )
    assert "is a folder" in error_of(tmp_path)


def test_set_overrides_one_key(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, MINIMAL + "run: {seed: 1, threads: 2}\n"),
        [
            "run.seed=7",
            "quantize.method=rtn",
            "quantize.scheme=int4-g64",
            'quantize.overrides."re:.*up".scheme=dense',
        ],
    )
    assert (config.run.seed, config.run.threads) == (7, 2)
    assert config.quantize is not None
    assert config.quantize.overrides["re:.*up"].scheme == "dense"


def test_set_reaches_into_lists_and_later_ones_win() -> None:
    data = {"model": {"path": "m"}, "export": [{"format": "gguf"}]}
    config = load_config(data, ["export.0.format=safetensors", "run.seed=1", "run={}"])
    assert config.export[0].format == "safetensors"
    assert config.run.seed == 0
    assert data["export"] == [{"format": "gguf"}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run.sed=1", "--set run.sed=1: run.sed: unknown key; did you mean 'seed'?"),
        ("run.seed=x", "--set run.seed=x: run.seed: expected a whole number"),
        ("run", "--set run: expected key.key=value"),
        ("run.seed=[1", "--set run.seed=[1:1:"),
        ("model.path.x=1", "--set model.path.x=1: model.path.x: cannot be set"),
        ("export.3.format=gguf", "--set export.3.format=gguf: export"),
        ("quantize.method=rtn", "--set quantize.method=rtn: quantize.scheme: required"),
    ],
)
def test_errors_of_set_point_at_it(tmp_path: Path, text: str, expected: str) -> None:
    assert error_in(tmp_path, MINIMAL, text).startswith(expected)


def test_options_of_a_command_line_are_parsed_as_yaml() -> None:
    assert parse_options(["embedding=q8_0", "deep.list=[1, 2.5]"]) == {
        "embedding": "q8_0",
        "deep": {"list": [1, 2.5]},
    }


def test_schema_describes_every_key() -> None:
    schema = config_schema()
    assert set(schema["properties"]) == set(Config.model_fields)
    sections = {k: v for k, v in schema["$defs"].items() if k != "Config"}
    undescribed = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, value in section["properties"].items()
        if "description" not in value
    ]
    assert undescribed == []


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("[rotatoin]", ":2:14: transforms.0: unknown transform 'rotatoin'; did you"),
        ("[{nam: awq}]", ":2:14: transforms.0.name: required key is missing"),
        ("[3]", ":2:14: transforms.0: expected keys and values, got 3"),
        (
            "[{name: smoothquant, alfa: 1}]",
            ":2:34: transforms.0.alfa: unknown key; did you mean 'alpha'?",
        ),
        (
            "[scale_folding, {name: smoothquant, alpha: 2}]",
            ":2:49: transforms.1.alpha: input should be less than or equal to 1",
        ),
        ("[scale_folding, scale_folding]", ":2:29: transforms.1: 'scale_folding' is"),
        ("[scale_folding, rotation]", ":2:29: transforms.1: a rotation mixes"),
        ("[awq]", ":2:14: transforms.0: awq searches on the plan's grids; add"),
        (
            "[{name: rotation, heads: false, residual: false}]",
            ":2:14: transforms.0: a rotation needs residual, heads or both",
        ),
    ],
)
def test_wrong_transforms_are_told_with_their_place(
    written: str, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: x}}\ntransforms: {written}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert f"run.yaml{expected}" in str(caught.value)


def test_a_transform_is_a_name_or_a_name_with_options() -> None:
    listed = ["rotation", {"name": "smoothquant", "alpha": 0.8}]
    config = load_config({"model": {"path": "x"}, "transforms": listed})
    entries = [(entry.name, dict(entry.options)) for entry in config.transform_entries]
    assert entries == [("rotation", {}), ("smoothquant", {"alpha": 0.8})]
    assert config.model_dump(mode="json")["transforms"] == listed
