"""What is wrong with the input is said in words, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import (
    call,
    config_of,
    copy_without,
    digests,
    save_checkpoint,
    write_config,
    write_text,
)
from safetensors.torch import load_file, save_file

import compress

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def gguf(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole GGUF file."""
    folder = tmp_path_factory.mktemp("gguf")
    settings = config_of(checkpoint, write_text(folder), folder / "run")
    settings |= {"quantize": None, "evaluate": None, "export": [{"format": "gguf"}]}
    workdir = compress.run({k: v for k, v in settings.items() if v}).workdir
    (path,) = (workdir / "export" / "gguf").iterdir()
    return path


class Bench:
    """A broken copy of a model, and a run on it."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder, self.workdir = folder, folder / "run"
        self.model = copy_without(checkpoint, folder / "model")
        self.text = write_text(folder)

    def config(self, **changes: Any) -> Path:
        settings = config_of(self.model, self.text, self.workdir, **changes)
        return write_config(self.folder / "run.yaml", settings)

    def refuses(
        self, *words: str, code: int, config: Path | None = None, flags: str = ""
    ) -> str:
        """Run; check exit code, words, and that nothing is left half-written."""
        result = call("run", config or self.config(), *flags.split())
        assert result.exit_code == code, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert "Traceback" not in result.output
        for word in words:
            assert word in result.stderr
        assert result.stdout == ""
        assert not list(self.folder.rglob("*.part"))
        assert not (self.workdir / "export").exists() or not any(
            (self.workdir / "export").iterdir()
        )
        assert not (self.workdir / "report.json").exists()
        return result.stderr

    def leaves_nothing(self) -> None:
        assert not self.workdir.exists()

    def change_config(self, **changes: Any) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def change_weights(self, **changes: torch.Tensor | None) -> None:
        """Replace tensors (dots as two underscores); ``None`` removes one."""
        state = load_file(self.model / WEIGHTS)
        for name, tensor in changes.items():
            key = name.replace("__", ".")
            del state[key]
            if tensor is not None:
                state[key] = tensor
        save_file(state, self.model / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture
def bench(checkpoint: Path, tmp_path: Path) -> Bench:
    return Bench(tmp_path, checkpoint)


def test_an_unknown_key_has_a_place_and_a_guess(bench: Bench) -> None:
    path = bench.config(quantize={"scheem": "int4"})
    lines = path.read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if "scheem" in text)
    bench.refuses(
        f"run.yaml:{line}:",
        "quantize.scheem: ",
        "did you mean 'scheme'",
        code=2,
        config=path,
    )
    bench.leaves_nothing()


def test_all_mistakes_come_at_once(bench: Bench) -> None:
    path = bench.config(
        calibration={"samples": "many"}, run={"deivce": "cpu"}, quantize={"scheme": 4}
    )
    bench.refuses(
        "calibration.samples: ",
        "run.deivce: ",
        "quantize.scheme: ",
        code=2,
        config=path,
    )
    bench.leaves_nothing()


def test_a_wrong_type_is_named(bench: Bench) -> None:
    path = bench.config(calibration={"samples": "8"})
    message = bench.refuses("calibration.samples: ", "run.yaml:", code=2, config=path)
    assert "expected a whole number, got '8' (text)" in message
    bench.leaves_nothing()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantize": {"method": "gtpq"}}, ("'gtpq'", "did you mean 'gptq'")),
        ({"quantize": {"scheme": "int4-g0"}}, ("quantize.scheme: ", "int4-g0")),
        ({"quantize": {"options": {"dmap": 1}}}, ("quantize.options.dmap", "'damp'")),
        ({"export": [{"format": "gguff"}]}, ("'gguff'", "did you mean 'gguf'")),
        ({"export": [{"format": "gguf", "embeding": 1}]}, ("embeding", "'embedding'")),
        (
            {"export": [{"format": "gguf"}] * 2},
            ("export.1.format: 'gguf' is also export.0",),
        ),
        ({"evaluate": {"perplexity": ["wikitext"]}}, ("did you mean 'wikitext2'",)),
        (
            {"quantize": {"overrides": {"lm_haed": {"scheme": "int8"}}}},
            ("quantize.overrides.lm_haed: no layer has this name",),
        ),
        (
            {"quantize": {"scheme": "int4-g48"}},
            (
                "group_size 48 does not divide the 64 columns of model.layers.0",
                "use 16",
            ),
        ),
        (
            {"quantize": {"scheme": "int3-g32"}, "export": [{"format": "gguf"}]},
            ("export.gguf: model.layers.0.self_attn.q_proj", "int3-g32"),
        ),
    ],
)
def test_configs_that_cannot_be_carried_out(
    bench: Bench, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    bench.refuses(*words, code=2, config=bench.config(**changes))
    bench.leaves_nothing()


def test_a_missing_config_is_named(bench: Bench) -> None:
    bench.refuses("nothing.yaml", code=2, config=bench.folder / "nothing.yaml")


def test_a_missing_model_is_named(bench: Bench) -> None:
    missing = str(bench.folder / "nothing")
    config = bench.config(model={"path": missing})
    bench.refuses(f"{missing}: no such file or folder", code=1, config=config)
    bench.leaves_nothing()


@pytest.mark.parametrize(("section", "code"), [("calibration", 1), ("evaluate", 2)])
def test_a_missing_text_is_named(bench: Bench, section: str, code: int) -> None:
    missing = str(bench.folder / "nothing.txt")
    value = {"data": missing} if section == "calibration" else {"perplexity": [missing]}
    config = bench.config(**{section: value})
    bench.refuses(f"{missing} does not exist", code=code, config=config)
    bench.leaves_nothing()


@pytest.mark.parametrize("content", ["", " \n\n \t"])
def test_an_empty_calibration_text_is_refused(bench: Bench, content: str) -> None:
    bench.text.write_text(content)
    config = bench.config(evaluate={"perplexity": ["tales"]})
    bench.refuses(f"{bench.text} holds no text", "mix", code=1, config=config)
    bench.leaves_nothing()


def test_a_short_calibration_text_says_how_short(bench: Bench) -> None:
    bench.text.write_text("A few words.")
    config = bench.config(evaluate=None)
    bench.refuses("8 are asked for; lower samples", code=1, config=config)
    bench.leaves_nothing()


@pytest.mark.parametrize("kept", [4, 1000, -5])
def test_truncated_safetensors(bench: Bench, kept: int) -> None:
    path = bench.model / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    bench.refuses(f"{path}: truncated", "download it again", code=1)
    bench.leaves_nothing()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated_gguf(bench: Bench, gguf: Path, share: float) -> None:
    path = bench.folder / "cut.gguf"
    data = gguf.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    config = bench.config(model={"path": str(path)})
    bench.refuses(str(path), code=1, config=config)
    bench.leaves_nothing()


def test_a_gguf_that_is_none(bench: Bench) -> None:
    path = bench.folder / "fake.gguf"
    path.write_bytes(b"PK\3\4" * 100)
    config = bench.config(model={"path": str(path)})
    bench.refuses(f"{path}: ", "GGUF", code=1, config=config)
    bench.leaves_nothing()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bench: Bench, method: str, value: float) -> None:
    weight = load_file(bench.model / WEIGHTS)[UP]
    weight[5, 6] = value
    bench.change_weights(**{UP.replace(".", "__"): weight})
    config = bench.config(quantize={"method": method})
    bench.refuses(
        f"{UP} has 1 NaN or infinite values out of {weight.numel()}",
        code=1,
        config=config,
    )


def test_a_missing_tensor(bench: Bench) -> None:
    bench.change_weights(**{UP.replace(".", "__"): None})
    bench.refuses(f"{UP} is missing", "the checkpoint is incomplete", code=1)
    bench.leaves_nothing()


def test_a_missing_norm(bench: Bench) -> None:
    bench.change_weights(model__norm__weight=None)
    bench.refuses("the checkpoint lacks model.norm.weight", code=1)
    bench.leaves_nothing()


def test_a_wrong_shape(bench: Bench) -> None:
    bench.change_weights(**{UP.replace(".", "__"): torch.zeros(96, 32)})
    bench.refuses(f"{UP} has shape (96, 32); the config says (96, 64)", code=1)
    bench.leaves_nothing()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("gpt_neox", ("'gpt_neox' is not a supported architecture", "Supported: ")),
        ("qwen2_moe", ("'qwen2_moe' is not a supported architecture", "qwen3_moe")),
    ],
)
def test_architectures_that_are_not_supported(
    bench: Bench, kind: str, words: tuple[str, ...]
) -> None:
    bench.change_config(model_type=kind)
    bench.refuses(*words, code=1)
    bench.leaves_nothing()


def test_pickled_weights(bench: Bench) -> None:
    (bench.model / WEIGHTS).unlink()
    torch.save({"a": torch.ones(3)}, bench.model / "pytorch_model.bin")
    bench.refuses("only pickled weights (pytorch_model.bin)", "safetensors", code=1)
    bench.leaves_nothing()


def test_a_missing_shard(bench: Bench, checkpoint: Path) -> None:
    (bench.model / WEIGHTS).unlink()
    index = {"weight_map": {UP: "model-00001-of-00002.safetensors"}}
    (bench.model / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    bench.refuses("shard model-00001-of-00002.safetensors is missing", code=1)
    bench.leaves_nothing()


def test_a_folder_without_tokenizer(bench: Bench) -> None:
    for path in bench.model.glob("tokenizer*"):
        path.unlink()
    bench.refuses("no usable tokenizer", code=1)
    bench.leaves_nothing()


def test_a_work_directory_that_is_a_file(bench: Bench) -> None:
    bench.workdir.touch()
    bench.refuses(f"run.workdir: {bench.workdir} is a file", code=2)


def test_a_device_that_is_not_there(bench: Bench) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    config = bench.config(run={"device": "cuda"})
    bench.refuses("run.device: cuda is not available", code=2, config=config)
    bench.leaves_nothing()


def test_flags_that_exclude_each_other(bench: Bench) -> None:
    bench.refuses("exclude each other", code=2, flags="--resume --overwrite")


@pytest.mark.parametrize("command", ["eval", "inspect"])
@pytest.mark.parametrize("content", [b"", b"GGUF\3\0\0\0", b"\0" * 64])
def test_other_commands_refuse_damaged_files(
    tmp_path: Path, command: str, content: bytes
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    result = call(command, path)
    assert result.exit_code == 1
    assert str(path) in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("number", range(1, 12))
def test_a_disk_that_is_full_at_any_write(
    bench: Bench, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th flush fails; the run goes on later and ends as if nothing had been."""
    config = bench.config(export=[{"format": "safetensors"}, {"format": "gguf"}])
    seen, fsync = 0, os.fsync

    def full(file: int) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    result = call("run", config)
    monkeypatch.undo()
    if seen < number:
        assert result.exit_code == 0
        return
    assert result.exit_code == 1, result.output
    assert "the disk is full" in result.stderr or "No space left" in result.stderr
    assert "free some space" in result.stderr
    assert "--resume" in result.stderr
    assert not list(bench.workdir.rglob("*.part"))
    assert call("run", config, "--resume").exit_code == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for the checkpoints of blocks and no more."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=224k", "tmpfs", str(disk)]
    mounted = subprocess.run(["mount", *options], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let us mount")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(bench: Bench, small_disk: Path) -> None:
    bench.workdir = small_disk / "run"
    config = bench.config(export=[{"format": "safetensors"}])
    bench.refuses("No space left on device", "--resume", code=1, config=config)
    assert (bench.workdir / "blocks" / "0001.safetensors").is_file()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert call("run", config, "--resume").exit_code == 0
    elsewhere = bench.folder / "elsewhere"
    other = bench.config(run={"workdir": str(elsewhere)})
    assert call("run", other).exit_code == 0
    assert digests(bench.workdir / "export") == digests(elsewhere / "export")
