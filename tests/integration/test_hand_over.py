"""A result in the hands of its user: the hub, notebooks, pipelines, data sets."""

from __future__ import annotations

import html
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pipeline_fixtures import LONG_TEXT, Ground, call, save_checkpoint, write_text

import compress
from compress.core.errors import CalibrationError, CompressError, ConfigError
from compress.progress import progress_bar
from compress.report.public import PathHider


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("secret-home")
    save_checkpoint(folder / "model")
    return Ground(folder, folder / "model", write_text(folder))


@pytest.fixture(scope="module")
def result(ground: Ground) -> compress.Result:
    return compress.run(
        ground.config("run", quantize={"method": "rtn", "scheme": "int4-g32"}),
        command=f"compress run {ground.folder}/mine.yaml",
    )


class Hub:
    """Stands in for ``huggingface_hub.HfApi``: keeps what it is given."""

    def __init__(self, folder: Path, *, refuses: bool = False) -> None:
        self.folder, self.refuses, self.private = folder, refuses, True

    def __call__(self, token: str | None = None) -> Hub:
        return self

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
        if self.refuses:
            raise OSError("401 Unauthorized")
        self.private = private
        return f"https://hub/{repo}"

    def upload_folder(
        self, *, repo_id: str, folder_path: str, commit_message: str
    ) -> None:
        shutil.copytree(folder_path, self.folder / repo_id)


def test_the_hub_gets_export_and_card_and_nothing_of_this_machine(
    result: compress.Result,
    ground: Ground,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = Hub(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    (result.workdir / "prompt").mkdir()
    adapter = {"base_model_name_or_path": str(ground.model), "chat": "</s> /x {a}"}
    (result.workdir / "prompt" / "adapter_config.json").write_text(json.dumps(adapter))
    done = result.push_to_hub("me/small", private=False)
    shutil.rmtree(result.workdir / "prompt")
    there = tmp_path / "me" / "small"
    names = {str(p.relative_to(there)) for p in there.rglob("*") if p.is_file()}
    assert names == set(done.files)
    assert {"README.md", "model.safetensors", "tokenizer.json", "config.json"} < names
    assert (done.url, hub.private) == ("https://hub/me/small", False)
    words = LONG_TEXT.split("\n\n")[5]
    for path in there.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"secret-home" not in data and str(Path.home()).encode() not in data
            assert words.encode() not in data
    sent = json.loads((there / "prompt" / "adapter_config.json").read_text())
    assert sent == {"base_model_name_or_path": "model", "chat": "</s> /x {a}"}
    card = (there / "README.md").read_text()
    assert card.startswith("---\n") and "## Compression report: model" in card
    assert "compress run mine.yaml" in card and 'from_pretrained("me/small")' in card
    loaded = compress.load(there)
    assert loaded(torch.tensor([[3, 4]])).logits.isfinite().all()
    assert not list(result.workdir.glob(".push-*"))


def test_a_dry_run_of_the_command_sends_nothing(
    result: compress.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    done = call("push", result.workdir, "me/small", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "nothing was sent" in done.stdout and "## Compression report" in done.stdout
    found = json.loads(
        call("push", result.workdir, "me/small", "--dry-run", "--json").stdout
    )
    assert found["url"] is None and "README.md" in found["files"]


@pytest.mark.parametrize(
    ("repo", "options", "said"),
    [
        ("small", {}, "owner/name"),
        ("me/small", {"format": "gguf"}, "there are safetensors"),
        ("me/small", {}, "hf auth login"),
    ],
)
def test_what_cannot_be_pushed_says_what_to_do(
    result: compress.Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    repo: str,
    options: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub(tmp_path, refuses=True))
    with pytest.raises(CompressError, match=said):
        result.push_to_hub(repo, **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("compress run /home/me/a.yaml --x", "compress run a.yaml --x"),
        ("data: ~/texts/b.txt, 3 tokens/s", "data: b.txt, 3 tokens/s"),
        (r"C:\Users\me\c.txt", "c.txt"),
        ("see https://a.b/c and export/gguf/d.gguf", None),
        ("KL 1 / 2, and/or", None),
    ],
)
def test_paths_are_cut_to_names_and_addresses_stay(
    text: str, expected: str | None
) -> None:
    hider = PathHider({}, ())
    assert hider.report({"a": [text], "host": "b"}) == {"a": [expected or text]}


def test_a_result_is_opened_again_and_shown_in_a_notebook(
    result: compress.Result, tmp_path: Path
) -> None:
    again = compress.open_result(result.workdir)
    assert again.report["hashes"] == result.report["hashes"]
    view = again._repr_html_()
    frame = view.partition('srcdoc="')[2].partition('"')[0]
    assert html.unescape(frame).startswith("<!DOCTYPE html>")
    for fetched in (" src=", 'href="http', "@import", "url("):
        assert fetched not in html.unescape(view)
    assert "perplexity" in view and "KL to base" in view
    assert len(repr(again)) < 300 and "rtn int4-g32" in repr(again)
    with pytest.raises(ConfigError, match="no finished run"):
        compress.open_result(tmp_path)


def test_bars_are_drawn_in_a_notebook_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in progress_bar(range(3), desc="blocks"):
        pass
    drawn = capsys.readouterr()
    assert drawn.out + drawn.err == ""
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    kernel = SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setattr("compress.progress.find_spec", lambda _: None)
    for _ in progress_bar(range(3), desc="blocks", mininterval=0):
        pass
    assert "blocks: 100%" in capsys.readouterr().out
    for _ in progress_bar(range(2), desc="blocks", mininterval=0):
        for _ in progress_bar(range(2), desc="layers", mininterval=0):
            pass
    drawn = capsys.readouterr()
    assert "blocks: 100%" in drawn.out and "layers" not in drawn.out
    for _ in progress_bar(range(3), desc="blocks", disable=True):
        pass
    assert capsys.readouterr().out == ""


def test_three_lines_quantize_a_model_for_a_pipeline(ground: Ground) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    model = AutoModelForCausalLM.from_pretrained(ground.model)
    texts = Dataset.from_dict({"text": LONG_TEXT.split("\n\n")})
    coded = compress.quantize(model, "int4-g32", calibration=texts["text"])
    assert coded.records["model.layers.0.mlp.up_proj"]["error"] > 0
    assert len(repr(coded)) < 200
    writer = pipeline(
        "text-generation",
        model=coded.model,
        tokenizer=AutoTokenizer.from_pretrained(ground.model),
    )
    written = writer("The cat", max_new_tokens=4, do_sample=False)
    assert written[0]["generated_text"].startswith("The cat")
    coded.save(ground.folder / "coded")
    assert (ground.folder / "coded" / "tokenizer.json").is_file()
    for path in (ground.folder / "coded").iterdir():
        assert b"secret-home" not in path.read_bytes(), path.name
    for wrong in ("one text", [1, 2], [], torch.ones(3, 2)):
        with pytest.raises(CalibrationError, match="calibration: "):
            compress.quantize(model, "int4-g32", calibration=wrong)  # type: ignore[arg-type]
