"""The command line: what reaches the pipeline, what is printed where, exit codes."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import compress
from compress.cli import app
from compress.core.errors import CheckpointError, PlanError


class Pipeline(types.ModuleType):
    """Stands in for the pipeline and remembers its calls."""

    def __init__(self) -> None:
        super().__init__("compress.pipeline")
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.failure: BaseException | None = None
        self.answer = answer = types.SimpleNamespace(
            summary=lambda: "the summary",
            report={"model": {"label": "m"}},
            failures=[],
            text=lambda: "the text",
            to_dict=lambda: {"a": 1},
        )
        metrics = {"texts": {"wikitext2": {"perplexity": 12.345678}}}
        for name in ("run", "plan", "search", "dry_run", "inspect", "export"):
            setattr(self, name, self._recorder(name, answer))
        self.evaluate = self._recorder("evaluate", metrics)

    def _recorder(self, name: str, answer: object) -> Callable[..., object]:
        def call(*args: Any, **kwargs: Any) -> object:
            self.calls.append((name, args, kwargs))
            if self.failure is not None:
                raise self.failure
            return answer

        return call


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    fake = Pipeline()
    monkeypatch.setitem(sys.modules, "compress.pipeline", fake)
    monkeypatch.setattr(compress, "pipeline", fake, raising=False)
    monkeypatch.setitem(sys.modules, "compress.searching", fake)
    monkeypatch.setattr(compress, "searching", fake, raising=False)
    return fake


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: somewhere}\n")
    return str(path)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        (("run", "CONFIG"), {"model": {"label": "m"}}),
        (("run", "CONFIG", "--dry-run"), {"a": 1}),
        (("export", "work", "--to", "gguf"), {"model": {"label": "m"}}),
    ],
)
def test_json_is_all_that_stdout_gets(
    words: tuple[str, ...], printed: object, pipeline: Pipeline, config: str
) -> None:
    given = [config if word == "CONFIG" else word for word in words]
    assert json.loads(call(*given, "--json").stdout) == printed


def test_run_hands_the_config_over_and_prints_the_summary(
    pipeline: Pipeline, config: str
) -> None:
    result = call("run", config, "--resume", "--set", "run.seed=3")
    assert (result.exit_code, result.stdout) == (0, "the summary\n")
    ((name, (loaded,), options),) = pipeline.calls
    assert name == "run"
    assert (loaded.model.path, loaded.run.seed) == ("somewhere", 3)
    assert (options["resume"], options["overwrite"]) == (True, False)
    assert options["command"].split()[0] == "compress"


@pytest.mark.parametrize("command", [("run",), ("export", "--to", "gguf")])
def test_an_export_that_fails_its_check_is_exit_code_1_after_the_summary(
    pipeline: Pipeline, config: str, command: tuple[str, ...]
) -> None:
    pipeline.answer.failures = ["gguf: the file's codes differ"]
    result = call(*command, config)
    assert (result.exit_code, result.stdout) == (1, "the summary\n")


def test_dry_run_computes_nothing(pipeline: Pipeline, config: str) -> None:
    result = call("run", config, "--dry-run")
    assert (result.exit_code, result.stdout) == (0, "the text\n")
    assert [name for name, _, _ in pipeline.calls] == ["dry_run"]


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_json_is_printed_on_request(
    pipeline: Pipeline, config: str, command: str
) -> None:
    assert call(command, config).stdout == "the text\n"
    assert json.loads(call(command, config, "--json").stdout) == {"a": 1}


def test_plan_searches_when_it_is_told_to(pipeline: Pipeline, config: str) -> None:
    sets = ("--set", "export=[{format: gguf}]", "--set", "quantize.method=rtn")
    assert call("plan", config, *sets, "--budget", "4.5bpw").stdout == "the text\n"
    assert call("plan", config, "--search", "--json").exit_code == 0
    (first, (loaded,), _), (second, _, _) = pipeline.calls
    assert (first, second) == ("search", "search")
    assert loaded.budget.bits_per_weight == 4.5


def test_eval_passes_its_options(pipeline: Pipeline) -> None:
    result = call("eval", "m", "--base", "b", "--text", "x", "--text", "y", "--json")
    assert json.loads(result.stdout)["texts"]["wikitext2"]["perplexity"] == 12.345678
    ((_, (model,), options),) = pipeline.calls
    assert (model, options["base"], options["texts"]) == ("m", "b", ["x", "y"])
    assert (options["windows"], options["sequence_length"]) == (10, 1024)


def test_eval_prints_a_table(pipeline: Pipeline) -> None:
    text = call("eval", "m").stdout
    assert "wikitext2  model       12.35" in text and "--json" in text


def test_export_parses_options(pipeline: Pipeline) -> None:
    result = call("export", "runs/x", "--to", "gguf", "--set", "embedding=q8_0")
    assert result.exit_code == 0
    assert pipeline.calls == [
        ("export", (Path("runs/x"), "gguf", {"embedding": "q8_0"}), {})
    ]


def test_list_shows_origin_and_state() -> None:
    result = call("list", "quantizers", "--json")
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert rows["rtn"]["works"]
    assert rows["rtn"]["origin"].startswith("compress-llm ")
    assert "rtn" in call("list").stdout


def test_schema_is_json() -> None:
    assert "model" in json.loads(call("schema").stdout)["properties"]


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (CheckpointError("weights are NaN"), 1, "weights are NaN"),
        (PlanError("does not fit"), 2, "does not fit"),
        (KeyboardInterrupt(), 130, "--resume"),
        (OSError(errno.ENOSPC, "No space left", "out.bin"), 1, "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "x: Permission"),
    ],
)
def test_failure_is_one_message_and_an_exit_code(
    pipeline: Pipeline, config: str, failure: BaseException, code: int, message: str
) -> None:
    pipeline.failure = failure
    result = call("run", config)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_our_own_bugs_keep_their_traceback(pipeline: Pipeline, config: str) -> None:
    pipeline.failure = ZeroDivisionError("a bug")
    assert isinstance(call("run", config).exception, ZeroDivisionError)


@pytest.mark.parametrize(
    "arguments",
    [
        ("run",),
        ("nonsense",),
        ("run", "missing.yaml"),
        ("run", "x.yaml", "--resume", "--overwrite"),
        ("eval", "m", "--windows", "0"),
        ("plan", "x.yaml", "--budget", "large"),
        ("export", "runs/x"),
        ("list", "quantiser"),
    ],
)
def test_bad_usage_exits_with_2(pipeline: Pipeline, arguments: tuple[str, ...]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr != ""


def test_config_errors_exit_with_2_on_stderr(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {pth: x}\n")
    result = call("run", str(path))
    assert result.exit_code == 2
    assert f"{path}:1:9: model.pth: unknown key; did you mean 'path'?" in result.stderr
    assert pipeline.calls == []


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["compress", "compress.cli", "compress.config"])
def test_import_does_not_load_torch(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'numpy', 'gguf', 'datasets'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run_python(code) == "[]"


def test_help_is_quick() -> None:
    """Time of the import in its own process, measured 0.1 s; 0.5 s is the promise."""
    code = (
        "import time; start = time.process_time()\n"
        "import compress.cli\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(compress.cli.app, ['--help']).exit_code == 0\n"
        "print(time.process_time() - start)"
    )
    assert float(run_python(code)) < 0.5


def test_module_runs_like_the_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "compress", "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"compress {compress.__version__}\n"


def test_public_names_are_lazy_and_complete() -> None:
    assert set(compress.__all__) <= set(dir(compress))
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text("utf-8")
    for name in set(compress.__all__) - {"__version__"}:
        assert getattr(compress, name) is not None
        assert f"[`compress.{name}`]" in page, f"docs/api.md does not list {name}"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = compress.nonsense  # type: ignore[attr-defined]
