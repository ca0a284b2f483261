"""Every block of code in the documents is parsed, checked or run on a tiny model."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from pipeline_fixtures import save_checkpoint
from ruamel.yaml import YAML

import compress
from compress.cli import app
from compress.config import load_config, load_sweep
from compress.core.contracts import Pruner, Quantizer
from compress.data import read_text

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
PLUGIN = ROOT / "tests/plugin/compress-plugin-demo"
NOT_RUN = "# not run by our tests: "
OTHERS = {"llama-cli", "llama-server", "llama-quantize", "vllm"}
"""Programs that are not ours; what they take is their business."""


@dataclass(frozen=True)
class Block:
    """A fenced block: what it says, and where."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def included(match: re.Match[str]) -> str:
    return (ROOT / match[1]).read_text("utf-8")


def blocks(language: str) -> list[Block]:
    """Return the blocks of a language in all pages, included files in place."""
    found = []
    for page in sorted(PAGES):
        text = page.read_text("utf-8")
        for fence in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M):
            if fence[1] == language:
                body = re.sub(r'^--8<-- "(.+)"\n', included, fence[2], flags=re.M)
                line = text.count("\n", 0, fence.start()) + 1
                found.append(Block(page, line, language, body))
    return found


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield each command of shell blocks, and of ``compress ...`` inside a sentence."""
    for block in blocks("sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            for command in shlex.join(shlex.split(line, comments=True)).split("'&&'"):
                if command.strip():
                    yield str(block), shlex.split(command)
    for page in sorted(PAGES):
        for quoted in re.findall(r"`(compress [^`\n]+)`", page.read_text("utf-8")):
            if not re.search(r"[|\[]|\.\.\.", quoted):  # a pattern, not a command
                yield str(page.relative_to(ROOT)), shlex.split(quoted)


def options_of(command: Any) -> set[str]:
    return {name for p in command.params for name in (*p.opts, *p.secondary_opts)}


def complaint_of_compress(words: list[str]) -> str | None:
    """Say what our command line would not take of these words, without running them."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    if hasattr(command, "commands"):  # no command, so an option such as --version
        known = options_of(command) | {"--help"}
        unknown = [word for word in words if word not in known]
        return f"unknown: {unknown}" if unknown else None
    context = command.context_class(command, info_name=command.name)
    try:
        _, left, _ = command.make_parser(context).parse_args(list(words))
    except Exception as error:  # typer has click inside, whose classes are private
        return str(error)
    return f"too many arguments: {left}" if left else None


def complaint(words: list[str]) -> str | None:
    """Say what is wrong with a command that a page shows, if anything is."""
    name, rest = Path(words[0]).name, words[1:]
    if name == "torchrun":
        name, rest = "python", rest[rest.index("-m") :]
    if name == "python" and rest[:2] == ["-m", "compress"]:
        name, rest = "compress", rest[2:]
    if name in ("compress", "llm-compress"):
        return complaint_of_compress(rest)
    if name == "python" and rest[0] != "-m":
        script = ROOT / rest[0]
        if not script.is_file():
            return "no such script"
        source = script.read_text("utf-8")
        flags = [word for word in rest if word.startswith("--")]
        unknown = [flag for flag in flags if f'"{flag}"' not in source]
        return f"unknown: {unknown}" if unknown else None
    if name == "make":
        made = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
        return None if set(rest) <= set(made) else "no such target"
    if name == "pip":
        extras = set(re.findall(r"\[(\w+)\]", " ".join(rest)))
        text = (ROOT / "pyproject.toml").read_text("utf-8")
        return None if all(f"\n{extra} = [" in text for extra in extras) else "no extra"
    tools = {"python", "ruff", "mypy", "lint-imports", "pre-commit"}
    return None if name in OTHERS | tools else "name it in OTHERS if it is right"


def test_every_command_is_one_that_there_is() -> None:
    shown = list(commands())
    assert len(shown) > 40
    wrong = [(where, " ".join(w), c) for where, w in shown if (c := complaint(w))]
    assert wrong == []


@pytest.mark.parametrize(
    "words",
    [
        ["compress", "run", "a.yaml", "--dryrun"],
        ["compress", "walk", "a.yaml"],
        ["compress", "list", "quantizers", "pruners"],
        ["torchrun", "-m", "compress", "run", "a.yaml", "--gpus", "2"],
        ["python", "benchmarks/none.py"],
        ["python", "benchmarks/pruning.py", "--no-such-option"],
        ["make", "coffee"],
        ["pip", "install", "compress-llm[coffee]"],
        ["coffee"],
    ],
    ids=" ".join,
)
def test_a_command_that_is_none_is_found(words: list[str]) -> None:
    assert complaint(words)


@pytest.fixture(scope="module")
def plugin_installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make the package of the page on quantizers known, as an install would."""
    site = tmp_path_factory.mktemp("site")
    for module in PLUGIN.glob("*.py"):
        shutil.copy(module, site)
    about = site / "compress_plugin_demo-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: compress-plugin-demo\nVersion: 0.1.0\n")
    text = (PLUGIN / "pyproject.toml").read_text("utf-8")
    groups = re.findall(r'^\[project\.entry-points\."(.+)"\]\n(.+)$', text, re.M)
    lines = [f"[{group}]\n{line.replace(chr(34), '')}\n" for group, line in groups]
    (about / "entry_points.txt").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        yield


@pytest.mark.usefixtures("plugin_installed")
@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_a_config_or_a_sweep(block: Block, tmp_path: Path) -> None:
    keys = YAML(typ="safe", pure=True).load(block.text)
    file = tmp_path / "shown.yaml"
    file.write_text(block.text)
    if "base" in keys:
        base = "model: {path: x}\nprune: {sparsity: 0.1}\nquantize: {method: gptq}\n"
        base += "allocate: {method: ilp}\nexport: [{format: gguf}]\n"
        (tmp_path / "mine.yaml").write_text(base)
        load_sweep(file, [f"base={tmp_path / 'mine.yaml'}"])
        return
    if "model" not in keys:  # a part of a config
        file.write_text(f"model: {{path: x}}\n{block.text}")
    load_config(file)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pages speak of: a model, a config, finished runs."""
    folder = tmp_path_factory.mktemp("pages")
    model = folder / "my_model"
    save_checkpoint(
        model,
        tie_word_embeddings=True,
        dtype=torch.float16,
        intermediate_size=320,
    )
    done = {
        "model": {"path": str(model)},
        "quantize": {"method": "rtn", "scheme": "int4-g32"},
        "export": [{"format": "safetensors"}, {"format": "gguf", "embedding": "f16"}],
        "run": {"workdir": str(folder / "runs/mine"), "verify": False, "threads": 1},
    }
    compress.run(done)
    (folder / "mine.yaml").write_text(
        "model: {path: my_model}\n"
        "quantize: {method: rtn, scheme: int4-g32}\n"
        "evaluate: {perplexity: [wikitext2], windows: 1}\n"
        "run: {workdir: runs/new}\n"
    )
    shutil.copytree(folder / "runs/mine", folder / "runs/quickstart")
    return folder


@pytest.fixture
def small_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundled texts a quarter as long, so that defaults do not take long."""

    def start_of(name: str) -> str:
        lines = read_text(name).splitlines(keepends=True)
        return "".join(lines[: len(lines) // 4])

    for user in ("compress.calibration.sources", "compress.evaluation.texts"):
        monkeypatch.setattr(f"{user}.read_text", start_of)


PAGES_WITH_PYTHON = sorted({block.page for block in blocks("python")})


@pytest.mark.integration
@pytest.mark.usefixtures("small_text")
@pytest.mark.parametrize(
    "page", PAGES_WITH_PYTHON, ids=lambda page: str(page.relative_to(ROOT))
)
def test_python_runs(
    page: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page, one after the other, as a reader would type them."""
    here = tmp_path / "here"
    shutil.copytree(place, here)
    monkeypatch.chdir(here)
    space: dict[str, Any] = {"__name__": "page"}
    shown = [block for block in blocks("python") if block.page == page]
    for block in shown:
        if not block.text.startswith(NOT_RUN):
            exec(compile(block.text, str(block), "exec"), space)  # noqa: S102
    if all(block.text.startswith(NOT_RUN) for block in shown):
        pytest.skip(shown[0].text.partition("\n")[0].removeprefix(NOT_RUN))


def test_the_page_on_quantizers_shows_the_files_that_are_installed() -> None:
    page = ROOT / "docs/howto/own_quantizer.md"
    shown = [block.text for block in blocks("python") if block.page == page]
    assert shown == [
        (PLUGIN / name).read_text("utf-8")
        for name in ("demo_power_of_two.py", "demo_longest.py")
    ]
    for text, kind in zip(shown, (Quantizer, Pruner), strict=True):
        space: dict[str, Any] = {"__name__": "page"}
        exec(text, space)  # noqa: S102 - our own page
        assert any(isinstance(v, type) and issubclass(v, kind) for v in space.values())
