"""Readers of files from strangers, each with small whole files to begin with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_corpus import QUESTION_FILES, TEMPLATE, Corpus


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        name: For people.
        folder: Of whole files.
        files: Those that are damaged, one at a time, relative to the folder.
        read: Reads a folder like it, which it may not change.
        cost: Of a case, in units of the cheapest.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    cost: float = 1.0


def targets(place: Path) -> list[Target]:
    """Make the whole files, and return all readers.

    Args:
        place: A folder for them.
    """
    logging.getLogger("compress").setLevel(logging.ERROR)
    made = Corpus(place)
    found = [
        Target("config", made.configs(), ("run.yaml", "small.yaml"), _config, 3),
        Target("sweep", made.sweeps(), ("sweep.yaml",), _sweep, 3),
        Target("foreign points", made.points(), ("points.json",), _points),
        Target("plan", made.run("rtn"), ("plan.json",), _plan),
        Target("checkpoint config", made.model, ("config.json",), _model, 6),
        Target("safetensors", made.model, ("model.safetensors",), _tensors),
        Target(
            "shard index", made.sharded(), ("model.safetensors.index.json",), _tensors
        ),
        Target(
            "tokenizer",
            made.model,
            ("tokenizer.json", "tokenizer_config.json"),
            _tokenizer,
            4,
        ),
        Target("gguf headers", made.gguf(), ("model.gguf",), _gguf),
        Target("gguf models", made.gguf(), ("model.gguf",), _gguf_model, 8),
        Target("imatrix", made.matrices(), ("x.gguf", "x.dat"), _imatrix),
        Target("calibration", made.texts(), ("a.jsonl", "b.jsonl", "c.txt"), _text),
        Target("questions", made.questions(), QUESTION_FILES, _questions),
        Target("policy", made.policy(), ("policy.json", "policy.safetensors"), _policy),
        Target("work directory", made.run("rtn"), made.workdir_files(), _workdir, 2),
        Target("caches", made.caches(), made.cache_files(), _caches),
        Target("training checkpoint", made.training(), ("t.safetensors",), _training),
        Target(
            "soft prompt",
            made.prompt(),
            ("adapter_config.json", "adapter_model.safetensors"),
            _prompt,
        ),
        Target("skip lists", made.packed("safetensors"), ("config.json",), _doctor),
    ]
    for form in ("safetensors", "palette", "aqlm"):
        folder = made.packed(form)
        files = tuple(p.name for p in folder.iterdir() if _holds_codes(p))
        found.append(Target(f"coded: {form}", folder, files, _model, 8))
    return found


def _holds_codes(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name == "config.json"


def _config(folder: Path) -> None:
    from compress.config import load_config

    load_config(folder / "run.yaml")
    load_config(folder / "small.yaml")


def _sweep(folder: Path) -> None:
    from compress.config import load_sweep

    load_sweep(folder / "sweep.yaml")


def _points(folder: Path) -> None:
    from compress.sweeping import _foreign_points

    _foreign_points(str(folder / "points.json"))


def _plan(folder: Path) -> None:
    from compress.core.plan import Plan

    plan = Plan.from_json((folder / "plan.json").read_text("utf-8", "replace"))
    Plan.from_json(plan.to_json())


def _tensors(folder: Path) -> None:
    from compress.model.sources import SafetensorsSource

    source = SafetensorsSource(folder)
    for name in source.tensors():
        source.read(name)


def _model(folder: Path) -> None:
    from compress.model.loading import check_tensors, open_model
    from compress.scoring import inspect

    inspect(folder)
    handle = open_model(str(folder), cache=folder / "cache")
    check_tensors(handle)
    for name in handle.source.tensors():
        handle.source.read(name)


def _tokenizer(folder: Path) -> None:
    from compress.calibration.sources import load_text
    from compress.model.loading import ModelHandle, open_model

    if not _KNOWN:
        _KNOWN.append(open_model(str(folder), cache=folder / "cache").description)
    from dataclasses import replace

    handle: Any = ModelHandle(replace(_KNOWN[0], assets=folder), None)  # type: ignore
    tokenizer = handle.tokenizer()
    load_text("mix/chat", tokenizer, characters=10)


_KNOWN: list[Any] = []


def _gguf(folder: Path) -> None:
    from compress.export.gguf_reader import open_gguf
    from compress.scoring import inspect

    inspect(folder / "model.gguf")
    file = open_gguf(folder / "model.gguf")
    for name in file.tensors:
        file.read_values(name)


def _gguf_model(folder: Path) -> None:
    from compress.model.loading import check_tensors, open_model

    handle = open_model(str(folder / "model.gguf"), cache=folder / "cache")
    check_tensors(handle)
    handle.tokenizer()
    for name in handle.source.tensors():
        handle.source.read(name)


def _imatrix(folder: Path) -> None:
    from compress.export.imatrix_reader import read_imatrix

    for name in ("x.gguf", "x.dat"):
        for entry in read_imatrix(folder / name).entries.values():
            entry.means()


class _Template:
    """A tokenizer's chat template alone."""

    chat_template = TEMPLATE

    def apply_chat_template(self, messages: Any, tokenize: bool) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def _text(folder: Path) -> None:
    from compress.calibration.sources import check_sources, load_text

    for name in ("a.jsonl", "b.jsonl", "c.txt"):
        check_sources(str(folder / name))
        load_text(str(folder / name), _Template(), characters=100)


def _questions(folder: Path) -> None:
    from compress.evaluation.tasks import load_tasks

    for task in load_tasks([str(folder)]):
        assert all(0 <= item.right < len(item.continuations) for item in task.items)


def _policy(folder: Path) -> None:
    from compress.allocators.ramp.policy import load_policy

    load_policy(folder)


def _workdir(folder: Path) -> None:
    from compress.planning.rerun import config_of_export
    from compress.scoring import inspect
    from compress.workdir import WorkDir

    work = WorkDir(folder)
    work.check(resume=True, overwrite=False)
    work.changed({"model": "x"})
    work.stored("export-gguf")
    for file in sorted((folder / "blocks").iterdir()):
        for layer in work.records(file.stem):
            work.read_layer(file.stem, layer).dequantize()
    inspect(folder)
    config_of_export(folder, "safetensors", {})


def _caches(folder: Path) -> None:
    """Damaged entries of a cache are made again; codes alone are refused."""
    import os

    from compress.allocation.journal import Journal
    from compress.allocation.store import LevelStore
    from compress.calibration import cache
    from compress.evaluation.measured import Measured

    store = LevelStore(folder)
    store.noted("bb")
    if store.find("aa") is not None:
        store.read("aa").dequantize()
    Journal(folder / "cc.jsonl", lambda assignment, share: 0.5)
    Measured(folder / "ee.json").part("one")
    os.environ["COMPRESS_CACHE"] = str(folder)
    cache.read_entry("dd", (2, 4))


def _training(folder: Path) -> None:
    from compress.recovery.checkpoints import Checkpoint

    Checkpoint.load(folder / "t.safetensors", {"text": "x"})


def _prompt(folder: Path) -> None:
    from compress.recovery.soft_prompt import read_prompt

    read_prompt(folder)


def _doctor(folder: Path) -> None:
    from compress.doctor.examination import examine

    examine(folder)
