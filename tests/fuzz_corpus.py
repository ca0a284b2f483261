"""Small whole files of every kind that is read, for ``fuzz_targets.py`` to damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pipeline_fixtures import config_of, save_checkpoint, write_config, write_text

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
)


QUESTION_FILES = (
    "piqa.validation.jsonl",
    "mmlu.test.jsonl",
    "mmlu.dev.jsonl",
    "own.jsonl",
)


class Corpus:
    """The whole files that targets begin with, made once in a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.model = place / "model"
        save_checkpoint(
            self.model,
            num_hidden_layers=1,
            hidden_size=32,
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        file = self.model / "tokenizer_config.json"
        settings = json.loads(file.read_text()) | {"chat_template": TEMPLATE}
        file.write_text(json.dumps(settings))
        write_text(place)
        self._runs: dict[str, Path] = {}

    def run(self, name: str, **changes: Any) -> Path:
        """Return the work directory of a run, carried out once."""
        import compress

        if name not in self._runs:
            sections: dict[str, Any] = {
                "quantize": {"method": "rtn", "scheme": "int4-g32"},
                "evaluate": None,
                "export": [{"format": "gguf"}],
            }
            workdir = self.place / "runs" / name
            text = self.place / "text.txt"
            settings = config_of(self.model, text, workdir, **(sections | changes))
            compress.run(settings)
            self._runs[name] = workdir
        return self._runs[name]

    def packed(self, form: str) -> Path:
        quantize: dict[str, Any] = {
            "safetensors": {"method": "rtn", "scheme": "int4-g32"},
            "palette": {"method": "kmeans", "scheme": "palette3"},
            "aqlm": {
                "method": "aqlm",
                "scheme": "aqlm-1x8g8",
                "scale_dtype": "float16",
                "options": {"allow_large_tables": True},
            },
        }[form]
        changes: dict[str, Any] = {"quantize": quantize, "export": [{"format": form}]}
        if form == "aqlm":  # codes of 8 bits want more vectors than the model has
            self.sharded()
            changes["model"] = {"path": str(self.place / "sharded")}
        run = self.run(f"as-{form}", **changes)
        return run / "export" / form

    def workdir_files(self) -> tuple[str, ...]:
        folder = self.run("rtn")
        return (
            "state.json",
            "report.json",
            "plan.json",
            "results/export-gguf.json",
            *(f"blocks/{p.name}" for p in (folder / "blocks").iterdir()),
        )

    def configs(self) -> Path:
        folder = self._folder("configs")
        text = self.place / "text.txt"
        small = config_of(self.model, text, folder / "run")
        write_config(folder / "small.yaml", small)
        sections: dict[str, Any] = {
            "budget": {"bits_per_weight": 4.25},
            "allocate": {"method": "ilp", "schemes": ["q3_k", "q4_k"], "options": {}},
            "transforms": ["rotation", {"name": "smoothquant", "alpha": 0.5}],
            "prune": {"method": "cfsp", "sparsity": 0.2, "round_to": 32},
            "recover": {"method": "distill", "options": {"steps": 4, "rank": 8}},
            "tune": {"method": "pv", "options": {"time": "30min"}},
            "evaluate": {"generate": 4, "prompts": ["One, two"]},
            "kv_cache": {"scheme": "fp8", "types": ["q8_0", "q4_0/q8_0"]},
            "quantize": {"overrides": {"re:.*down_proj": {"scheme": "int8-g32"}}},
            "export": [{"format": "gguf", "embedding": "f16"}],
        }
        del small["quantize"]["scheme"]
        full = config_of(self.model, text, folder / "run", **sections)
        del full["quantize"]["scheme"]
        write_config(folder / "run.yaml", full)
        return folder

    def sweeps(self) -> Path:
        folder = self._folder("sweeps")
        shutil.copy(self.configs() / "run.yaml", folder)
        sweep = {
            "base": "run.yaml",
            "workdir": "swept",
            "budgets": ["4.25bpw", "95MB", "0.3x"],
            "set": {"allocate.method": ["ilp", "greedy"]},
        }
        write_config(folder / "sweep.yaml", sweep)
        return folder

    def points(self) -> Path:
        folder = self._folder("points")
        points = [{"name": "other", "bytes": 1000, "kl": 0.5}]
        (folder / "points.json").write_text(json.dumps(points))
        return folder

    def sharded(self) -> Path:
        folder = self.place / "sharded"
        if not folder.exists():
            save_checkpoint(folder, num_hidden_layers=1, shard="60KB")
        return folder

    def gguf(self) -> Path:
        folder = self._folder("gguf")
        (file,) = (self.run("rtn") / "export" / "gguf").glob("*.gguf")
        shutil.copy(file, folder / "model.gguf")
        return folder

    def matrices(self) -> Path:
        from compress.export.imatrix import Importance, ImportanceMatrix, write_imatrix

        folder = self._folder("matrices")
        values = np.arange(1, 33, dtype="f4")[None]
        entry = Importance(values, np.array([4.0], "f4"))
        names = ("blk.0.attn_q.weight", "blk.0.ffn_up.weight")
        matrix = ImportanceMatrix(dict.fromkeys(names, entry), ("a.txt",), 3, 16)
        write_imatrix(folder / "x.gguf", matrix)
        data = np.int32(len(names)).tobytes()
        for name in names:
            data += np.int32(len(name)).tobytes() + name.encode()
            data += np.array([2, 32], "i4").tobytes() + values.tobytes()
        (folder / "x.dat").write_bytes(data)
        return folder

    def questions(self) -> Path:
        folder = self._folder("questions")
        asked = {"subject": "sums", "question": "2 + 2?", "choices": list("2345")}
        rows: tuple[dict[str, Any], ...] = (
            {"goal": "a", "sol1": "b", "sol2": "c", "label": 1},
            asked | {"answer": 2},
            asked | {"answer": 2},
            {"context": "2 + 2 =", "choices": [" 3", " 4"], "answer": 1},
        )
        for name, row in zip(QUESTION_FILES, rows, strict=True):
            (folder / name).write_text(f"{json.dumps(row)}\n" * 3)
        return folder

    def texts(self) -> Path:
        folder = self._folder("texts")
        (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "two \\u00e9"}\n')
        chat = {"messages": [{"role": "user", "content": "hello"}] * 2}
        (folder / "b.jsonl").write_text(f"{json.dumps(chat)}\n" * 3)
        (folder / "c.txt").write_text("plain text é\n" * 20)
        return folder

    def policy(self) -> Path:
        from compress.allocators.ramp.features import SIZES
        from compress.allocators.ramp.policy import (
            PolicyCard,
            build_actor,
            save_policy,
        )

        folder = self._folder("policy")
        card = PolicyCard(next(iter(SIZES)), (3, 8), (8, 8), {"steps": 3})
        save_policy(build_actor(card), card, folder)
        return folder

    def caches(self) -> Path:
        """A level, a journal, calibration tokens, and a table of losses."""
        import os

        from compress.allocation.journal import Journal
        from compress.allocation.store import Level, LevelStore
        from compress.calibration import cache
        from compress.evaluation.measured import Measured
        from compress.workdir import WorkDir

        folder = self._folder("caches")
        before = os.environ.get("COMPRESS_CACHE")
        os.environ["COMPRESS_CACHE"] = str(folder)
        work = WorkDir(self.run("rtn"))
        tensor = work.read_layer("0000", "model.layers.0.mlp.up_proj")
        store = LevelStore(folder)
        store.write(Level("aa", 0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 0.1), tensor)
        store.note("bb", [[0.5, 0.25], [1.0, 2.0]])
        Measured(folder / "ee.json").add("one", "base", {"perplexity": 4.0})
        journal = Journal(folder / "cc.jsonl", lambda assignment, share: 0.5)
        journal([0, None])
        journal([1, 1], 0.25)
        cache.write_entry("dd", torch.arange(8).view(2, 4))
        os.environ["COMPRESS_CACHE"] = before or ""
        return folder

    def cache_files(self) -> tuple[str, ...]:
        return (
            "aa/aa.safetensors",
            "bb/bb.json",
            "cc.jsonl",
            "ee.json",
            "calibration/dd.safetensors",
        )

    def training(self) -> Path:
        from compress.recovery.checkpoints import Checkpoint, Progress

        folder = self._folder("training")
        now, best = ({"a": torch.full((3, 2), x)} for x in (1.0, 2.0))
        state = {"a/step": torch.tensor(2.0), "a/exp_avg": torch.ones(3, 2)}
        Checkpoint(Progress(1.0, 2), now, best, state).save(
            folder / "t.safetensors", {"text": "x"}
        )
        return folder

    def prompt(self) -> Path:
        from compress.model.loading import open_model
        from compress.recovery.soft_prompt import save_prompt

        folder = self._folder("prompt")
        description = open_model(
            str(self.model), cache=self.place / "cache"
        ).description
        width = int(description.config["hidden_size"])
        save_prompt(torch.ones(2, width), description, folder)
        return folder

    def _folder(self, name: str) -> Path:
        folder = self.place / name
        folder.mkdir(exist_ok=True)
        return folder
