"""A tiny model that has learnt a little language, its codes, and short runs."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming_fixtures import model_of
from torch import Tensor

from compress.config.tune_section import PVOptions
from compress.core import grids
from compress.core.artifact import TensorSource
from compress.core.codebooks import to_stored
from compress.core.plan import LayerPlan, Plan
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.model.loading import ModelHandle, open_model
from compress.recovery import checkpoints
from compress.recovery.models import WholeModel
from compress.recovery.text import RecoveryText
from compress.transform import CompressedSource
from compress.tuning.tune import Tuned, tune

VOCABULARY = 128
_STEPS = 60


def language(windows: int, length: int = 24, *, seed: int = 0) -> Tensor:
    """Return windows of a random walk: each token has four successors."""
    successors = torch.randint(
        VOCABULARY, (VOCABULARY, 4), generator=torch.Generator().manual_seed(7)
    )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.empty(windows, length, dtype=torch.int64)
    tokens[:, 0] = torch.randint(VOCABULARY, (windows,), generator=generator)
    for place in range(1, length):
        turns = torch.randint(4, (windows,), generator=generator)
        tokens[:, place] = successors[tokens[:, place - 1], turns]
    return tokens


@cache
def _trained(kind: str) -> dict[str, Tensor]:
    """Return the weights of a model after some steps on the language."""
    model, _, _ = model_of(kind, tied=True)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(_STEPS):
        ids = language(32, seed=100 + step)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def save_teacher(folder: Path, kind: str = "llama") -> ModelHandle:
    """Save the trained model; returns it opened."""
    model, _, _ = model_of(kind, tied=True)
    model.load_state_dict(_trained(kind))
    model.save_pretrained(folder / "teacher")
    return open_model(str(folder / "teacher"), cache=folder / "cache")


def coded(weight: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Return codes by rounding to nearest, or by a few rounds of plain k-means."""
    weight = weight.float()
    if scheme.codebook is None:
        groups = grids.as_groups(weight, scheme)
        found = grids.search_parameters(groups, scheme)
        levels = grids.encode(groups, found, scheme).view(weight.shape)
        return grids.assemble(levels, found, scheme)
    return _clustered(weight, scheme)


def _clustered(weight: Tensor, scheme: Scheme) -> QuantizedTensor:
    book = scheme.codebook
    assert book is not None
    rows, columns = weight.shape
    scale = weight.norm(dim=1, keepdim=True) if book.scaled else torch.ones(1, 1)
    block = rows if book.positional else scheme.rows_of_scale(rows)
    runs = scheme.table_runs(rows, columns)
    generator = torch.Generator().manual_seed(0)
    tables = torch.zeros(runs, book.count, 1 << scheme.bits, book.vector)
    codes = torch.zeros(rows, columns // book.vector, book.count, dtype=torch.int64)
    scaled = weight / scale
    for run in range(runs):
        part, wide = slice(run * block, (run + 1) * block), slice(None)
        if book.positional:
            part, wide = slice(None), slice(run, run + 1)
        rest = scaled.view(rows, -1, book.vector)[part, wide].reshape(-1, book.vector)
        for m in range(book.count):
            places, table = _kmeans(rest, 1 << scheme.bits, generator)
            tables[run, m], rest = table, rest - table[places]
            found = codes[part, wide, m]
            codes[part, wide, m] = places.view(found.shape)
    stored = to_stored(codes.view(rows, -1), scheme.bits)
    dtype = torch.float16
    return QuantizedTensor(
        stored, scale.to(dtype), None, scheme, tables=tables.to(dtype)
    )


def _kmeans(
    points: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    size = math.ceil(count / len(points))
    first = torch.randperm(len(points), generator=generator).repeat(size)[:count]
    table = points[first].clone()
    for _ in range(5):
        places = torch.cdist(points, table).argmin(1)
        sums = torch.zeros_like(table).index_add_(0, places, points)
        sizes = torch.bincount(places, minlength=count).unsqueeze(1)
        table = torch.where(sizes > 0, sums / sizes.clamp(min=1), table)
    return torch.cdist(points, table).argmin(1), table


def coded_student(
    teacher: ModelHandle, scheme: str, *, embedding: bool = False
) -> tuple[ModelHandle, dict[str, QuantizedTensor]]:
    """Return a student whose linears have codes, and the codes."""
    parsed, model = Scheme.parse(scheme), teacher.description
    names = [*model.linears(), *([model.family.embedding] if embedding else [])]
    codes = {
        name: coded(teacher.source.read(f"{name}.weight"), parsed) for name in names
    }
    layers = {n: LayerPlan(n, t.shape, "rtn", parsed) for n, t in codes.items()}
    source: TensorSource = CompressedSource(
        teacher.source, Plan("tiny", layers), codes.__getitem__
    )
    return ModelHandle(model, source), codes


def divergence_of(
    found: Tuned, folder: Path, scheme: str, *, embedding: bool = False
) -> float:
    """Return the held-out KL of what tuning returned, by a model made from it."""
    teacher = save_teacher(folder)
    student, _ = coded_student(teacher, scheme, embedding=embedding)
    model = WholeModel(student, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in found.codes.items():
            weight = model.module.get_submodule(name).get_parameter("weight")
            weight.copy_(tensor.dequantize())
        for name, dense in found.dense.items():
            path, _, leaf = name.rpartition(".")
            model.module.get_submodule(path).get_parameter(leaf).copy_(dense)
        original = WholeModel(teacher, device="cpu", dtype=torch.float32)
        ids = text_of().held_out
        p = original.head.logits(original.states(ids)).log_softmax(-1)
        q = model.head.logits(model.states(ids)).log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())


def text_of(windows: int = 256, held_out: int = 16) -> RecoveryText:
    tokens = language(windows + held_out, seed=1)
    return RecoveryText(tokens[held_out:], tokens[:held_out], (), "digest")


def options_of(**changes: Any) -> PVOptions:
    values: dict[str, Any] = {
        "steps": 30,
        "batch": 8,
        "evaluations": 3,
        "dtype": "float32",
    }
    return PVOptions(**(values | changes))


def kill_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Let a run die right after it has written so many checkpoints."""
    save, done = checkpoints.Checkpoint.save, [0]

    def dying(self: checkpoints.Checkpoint, *arguments: Any) -> None:
        save(self, *arguments)
        done[0] += 1
        if done[0] == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.Checkpoint, "save", dying)


def tuned_codes(
    folder: Path,
    scheme: str,
    options: Any,
    *,
    kind: str = "llama",
    state: str = "state",
    embedding: bool = False,
) -> Tuned:
    """Tune a student's codes after the teacher's outputs, in one process."""
    teacher = save_teacher(folder, kind)
    student, codes = coded_student(teacher, scheme, embedding=embedding)
    return tune(
        student,
        teacher,
        codes,
        originals=teacher.source,
        text=text_of(),
        options=options,
        device="cpu",
        state=folder / state,
    )
