"""First configs, valid as they stand, with what was asked for; the list of plug-ins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from compress import cli_setup
from compress.cli import app
from compress.config import load_config
from compress.config.starting import TARGETS, starting_config
from compress.core.errors import ConfigError
from compress.registry import KINDS, entries


def call(*arguments: object, asked: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=asked)


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_setup, "_can_ask", lambda: True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", [None, "95MB", "4.25bpw", "0.3x"])
def test_a_config_says_what_was_asked_for(
    target: str, size: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(starting_config(model="org/name", target=target, size=size))
    config = load_config(file)
    assert config.model.path == "org/name"
    assert config.export[0].format in ("gguf", "safetensors")
    assert str(config.run.workdir) == "runs/name"
    assert config.quantize is not None and config.prune is None
    if size is None:
        assert config.budget is None and config.quantize.scheme
        return
    assert config.budget is not None and config.quantize.scheme is None
    wanted = {
        "95MB": ("bytes", "95MB"),
        "4.25bpw": ("bits_per_weight", 4.25),
        "0.3x": ("ratio", 0.3),
    }.get(size)
    if wanted:
        assert getattr(config.budget, wanted[0]) == wanted[1]


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a size such as 95MB"):
        starting_config(model="m", target="llamacpp", size="small")


@pytest.mark.parametrize(
    "model", ["C:\\models\\a b", "builtin:smollm2-135m", "null", "x # y", "12", "a: b"]
)
def test_names_that_yaml_would_misread_are_quoted(model: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(starting_config(model=model, target="llamacpp"))
    assert load_config(file).model.path == model


def test_pruning_is_written_with_its_share(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(starting_config(model="m", target="llamacpp", sparsity=0.25))
    section = load_config(file).prune
    assert section is not None and section.sparsity == 0.25


@pytest.mark.parametrize(
    ("widths", "group"), [((4096, 11008), 128), ((576, 1536), 64), ((96, 160), 32)]
)
def test_groups_divide_the_widths_of_a_local_model(
    widths: tuple[int, int], group: int, tmp_path: Path
) -> None:
    keys = dict(zip(("hidden_size", "intermediate_size"), widths, strict=True))
    (tmp_path / "config.json").write_text(json.dumps(keys))
    text = starting_config(model=str(tmp_path), target="transformers")
    assert f"scheme: int4-g{group} " in text


def test_init_writes_once_and_says_what_comes_next(tmp_path: Path) -> None:
    file = tmp_path / "my run.yaml"
    words = ("init", file, "--model", "m", "--target", "llamacpp")
    first = call(*words)
    assert first.exit_code == 0 and f"compress run '{file}'" in first.stdout
    again = call(*words)
    assert again.exit_code == 2 and "--force replaces it" in again.stderr
    assert call(*words, "--force", "--size", "9MB").exit_code == 0
    assert "bytes: 9MB" in file.read_text()


def test_init_asks_for_what_no_option_says(asking: None, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    result = call("init", file, asked="org/name\nvllm\n0.3x\n")
    assert result.exit_code == 0, result.output
    config = load_config(file)
    assert config.model.path == "org/name"
    assert config.export[0].options == {"runtime": "vllm"}
    assert config.budget is not None and config.budget.ratio == 0.3


def test_init_takes_defaults_for_empty_answers(asking: None, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    assert call("init", file, asked="m\n\n\n").exit_code == 0
    assert load_config(file).export[0].format == "gguf"


def test_init_without_a_terminal_says_which_option_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    result = call("init", file)
    assert result.exit_code == 2 and "--model" in result.stderr
    assert not file.exists()
    result = call("init", file, "--model", "m", "--target", "onnx")
    assert result.exit_code == 2 and "llamacpp, transformers, vllm" in result.stderr


def test_list_gives_a_line_and_a_source_for_every_plugin() -> None:
    printed = call("list").stdout
    for entry in entries():
        plugin = entry.load()
        assert f"{entry.name}  " in printed and plugin.summary in printed
        assert f"from: {plugin.source}" in printed
    assert [line for line in printed.splitlines() if line in KINDS] == list(KINDS)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("compress r", "run"),
        ("compress list qu", "quantizers"),
        ("compress init --target v", "vllm"),
        ("compress run --res", "--resume"),
    ],
)
def test_the_shell_completes_commands_and_values(words: str, wanted: str) -> None:
    environment = {
        "_COMPRESS_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    result = CliRunner().invoke(app, [], env=environment, prog_name="compress")
    assert wanted in result.stdout.split()
