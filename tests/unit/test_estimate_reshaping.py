"""Predicted time and memory of pruning and recovery: counts, and what they follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import config_of, save_checkpoint, write_text
from pruning_fixtures import pruning_of
from shapes_fixtures import CLOCK, LLAMA_7B
from streaming_fixtures import model_of

import compress
from compress.config.recover_section import DistillOptions, SoftPromptOptions
from compress.core.neurons import GatedMLP, NeuronStatistics
from compress.core.plan import Plan
from compress.planning import duration
from compress.planning.duration import Speeds
from compress.planning.pruning import (
    PruneWork,
    choice_seconds,
    prune_seconds,
)
from compress.planning.pruning_memory import prune_bytes
from compress.planning.recovery import (
    RecoverWork,
    recover_bytes,
    recover_seconds,
    trained_values,
)
from compress.planning.shapes import Shapes
from compress.pruners.taylor import Taylor

SPEEDS = Speeds(1e12, 5e11, 1e11, 1e-11, 1e-10)
WIDE = {"shape": "per-layer", "sparsity": 0.3}


def shapes_of(kind: str = "llama", **changes: Any) -> Shapes:
    _, description, _ = model_of(kind, **changes)
    return Shapes.of(description, Plan("tiny", {}))


def work_of(root: Path, samples: int = 64, **section: Any) -> PruneWork:
    _, description, source = model_of("llama", num_hidden_layers=5)
    made = pruning_of(description, source, root, **section)
    return PruneWork.of(made, (samples, 512))


def seconds(work: PruneWork) -> float:
    return prune_seconds(LLAMA_7B, replace(work, choice=0.0), SPEEDS)


def peak(work: PruneWork, *, on_gpu: bool = False) -> tuple[int, int]:
    return prune_bytes(LLAMA_7B, work, dtype=torch.float32, on_gpu=on_gpu)


def test_rounds_of_exchanges_and_own_text_are_counted(tmp_path: Path) -> None:
    none, some, more, written = (
        work_of(tmp_path, method="cfsp", **WIDE, **extra)
        for extra in ({}, {"exchanges": 2}, {"exchanges": 4}, {"generated": 64})
    )
    each = (seconds(more) - seconds(some)) / 2
    passes = 9 * duration.sweep(LLAMA_7B, 64 * 512, SPEEDS)
    assert each > passes and seconds(some) > seconds(none) + 2 * each
    assert seconds(written) > seconds(none) and written.tokens == 2 * none.tokens
    whole = 4 * LLAMA_7B.parameters
    assert peak(some, on_gpu=True)[1] > whole > peak(none, on_gpu=True)[1]
    assert peak(some)[0] > whole > peak(none)[0]


@pytest.mark.parametrize(
    "section",
    [
        {"method": "wanda_sp", "sparsity": 0.3},
        {"method": "taylor", "sparsity": 0.3, "repair": "none"},
        {"method": "cfsp", **WIDE},
        {"method": "comp", "depth_share": 0.0, "budgets": "measured", **WIDE},
        {"method": "taylor", "budgets": "learned", **WIDE},
        {"method": "maw", "blocks": 1},
        {"method": "maw", "kv_groups": 1, "repair": "least_squares"},
    ],
)
def test_more_text_takes_more_time_and_no_less_memory(
    section: dict[str, Any], tmp_path: Path
) -> None:
    few, more = (work_of(tmp_path, samples, **section) for samples in (16, 64))
    assert seconds(more) > seconds(few) > 0
    assert peak(more)[0] > peak(few)[0]
    assert all(size > 0 for size in peak(more, on_gpu=True))
    assert peak(more)[1] == 0


def test_a_correction_takes_five_passes_and_a_second_stream(tmp_path: Path) -> None:
    """Products alone: o and down are fitted, each on both models, which then go on."""
    section = {"method": "wanda_sp", "sparsity": 0.3}
    plain, corrected = (
        work_of(tmp_path, **section, propagate=how) for how in ("dense", "corrected")
    )
    more = seconds(corrected) - seconds(plain)
    assert more > 4 * duration.sweep(LLAMA_7B, 64 * 512, SPEEDS)
    assert peak(corrected)[0] > peak(plain)[0] + 4 * 64 * 512 * LLAMA_7B.hidden


def test_a_method_without_text_only_copies(tmp_path: Path) -> None:
    works = [work_of(tmp_path, n, method="maw", sparsity=0.3) for n in (16, 64)]
    assert works[0].windows is None
    assert seconds(works[0]) == seconds(works[1])
    assert peak(works[0]) == (2 * 2 * LLAMA_7B.block, 0)


def test_each_stage_adds_its_time(tmp_path: Path) -> None:
    plain = {"method": "wanda_sp", "sparsity": 0.3, "repair": "none"}
    base = seconds(work_of(tmp_path, **plain))
    for change in (
        {"method": "taylor"},  # a backward pass
        {"repair": "least_squares"},
        {"shape": "per-layer", "budgets": "cfsp"},
        {"kv_groups": 1},
        {"propagate": "pruned"},
        {"propagate": "corrected", "repair": "least_squares"},
    ):
        assert seconds(work_of(tmp_path, **plain | change)) > base, change
    learned = work_of(tmp_path, **plain | {"shape": "per-layer", "budgets": "learned"})
    cfsp = work_of(tmp_path, **plain | {"shape": "per-layer", "budgets": "cfsp"})
    assert seconds(learned) > seconds(cfsp)
    assert peak(learned)[0] > 4 * LLAMA_7B.parameters > peak(cfsp)[0]


def test_the_backward_pass_is_two_more_forward_passes_of_64_windows(
    tmp_path: Path,
) -> None:
    """Products alone: passes over memory and reading are free here."""
    fast = Speeds(1.0, float("inf"), float("inf"), 0.0, 0.0)
    section = {"sparsity": 0.3, "repair": "none"}
    taylor, wanda = (
        prune_seconds(
            LLAMA_7B,
            replace(work_of(tmp_path, 128, method=m, **section), choice=0),
            fast,
        )
        for m in ("taylor", "wanda_sp")
    )
    tokens = 64 * 512
    products = 3 * 2 * tokens * LLAMA_7B.active * LLAMA_7B.blocks
    products += 2 * 2 * tokens * LLAMA_7B.vocabulary * LLAMA_7B.hidden
    assert taylor - wanda == pytest.approx(products, rel=1e-9)


@pytest.mark.parametrize("unit", ["block", "attention"])
def test_removals_by_perplexity_try_all_candidates(unit: str, tmp_path: Path) -> None:
    section = {"method": "maw", "parameters": 0.1, "depth_share": 1.0}
    section |= {"depth_unit": unit, "shape": "per-layer", "budgets": "uniform"}
    by = {
        name: replace(work_of(tmp_path, 16, **section, depth_by=name), removals=2)
        for name in ("importance", "perplexity")
    }
    one = replace(by["perplexity"], removals=1)
    assert seconds(by["perplexity"]) > 5 * seconds(by["importance"])
    assert seconds(by["perplexity"]) > 1.9 * seconds(one) - seconds(
        replace(one, removals=0)
    )
    assert peak(one)[0] > 16 * 512 * LLAMA_7B.hidden * 4 * (LLAMA_7B.blocks - 3)


def test_attention_by_perplexity_counts_each_run(tmp_path: Path) -> None:
    """A loop over candidates and blocks beside the sum."""
    fast = Speeds(1.0, float("inf"), float("inf"), 0.0, 0.0)
    section = {"method": "maw", "parameters": 0.08, "depth_unit": "attention"}
    section |= {"depth_share": 1.0, "shape": "per-layer", "budgets": "uniform"}
    work = replace(work_of(tmp_path, 16, **section), removals=1, measures=False)
    work = replace(work, neurons=False, choice=0.0)
    none = prune_seconds(LLAMA_7B, replace(work, removals=0), fast)
    found = prune_seconds(LLAMA_7B, work, fast) - none
    runs = sum(
        1 + sum(1 for candidate in range(1, LLAMA_7B.blocks) if candidate <= block)
        for block in range(LLAMA_7B.blocks)
    )
    tokens = 16 * 512
    expected = runs * 2 * tokens * LLAMA_7B.active
    expected += (
        (LLAMA_7B.blocks - 1) * 2 * tokens * LLAMA_7B.vocabulary * LLAMA_7B.hidden
    )
    assert found == pytest.approx(expected, rel=1e-6)


class Cubic(Taylor):
    """Takes time that grows with the cube of the neurons."""

    def scores(
        self, mlp: GatedMLP, statistics: NeuronStatistics | None
    ) -> torch.Tensor:
        CLOCK.now += 0.02 * (mlp.neurons / 512) ** 3
        return super().scores(mlp, statistics)


def test_the_choice_of_a_method_is_carried_to_the_width(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(duration, "time", CLOCK)
    found = choice_seconds(Cubic(), 2048, 512, 0.8)
    assert found == pytest.approx(0.02 * 4**3)


def recovery(kind: str = "llama", **options: Any) -> RecoverWork:
    _, description, _ = model_of(kind)
    parsed = DistillOptions(**options)
    trained, replaced = trained_values(parsed, description)
    shapes = Shapes.of(description, Plan("tiny", {}))
    return RecoverWork(parsed, shapes, shapes, trained, replaced, 0)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_what_is_trained_is_what_training_holds(kind: str, tmp_path: Path) -> None:
    """Beside the parameters that the training itself makes."""
    pytest.importorskip("peft")
    from compress.model.loading import ModelHandle
    from compress.recovery.lora import LoraWeights
    from compress.recovery.models import WholeModel
    from compress.recovery.trained import FullWeights

    _, description, source = model_of(kind)
    handle = ModelHandle(description, source)

    def model() -> WholeModel:
        return WholeModel(handle, device="cpu", dtype=torch.float32)

    full = FullWeights(model(), handle).parameters.values()
    options = DistillOptions(train="full")
    assert trained_values(options, description)[0] == sum(p.numel() for p in full)
    lora = LoraWeights(
        model(), handle, ranks=[4, 4, 4], plus=8.0, norms=True, seed=0
    ).parameters.values()
    options = DistillOptions(rank=4)
    assert trained_values(options, description)[0] == sum(p.numel() for p in lora)
    prompt = SoftPromptOptions(tokens=7)
    assert trained_values(prompt, description) == (7 * 64, 0)


def test_a_trained_weight_takes_sixteen_bytes() -> None:
    work = recovery(train="full", steps=4)
    more = replace(work, trained=work.trained + 1000)
    for on_gpu, beside in ((False, 4), (True, 0)):
        place = int(on_gpu)
        sizes = [
            recover_bytes(w, dtype=torch.float32, on_gpu=on_gpu)[place]
            for w in (work, more)
        ]
        assert sizes[1] - sizes[0] == 1000 * (16 + beside)


def test_recovery_takes_its_minutes_or_its_steps() -> None:
    timed = recover_seconds(recovery(minutes=7), SPEEDS)
    assert 420 <= timed < 421
    few, more, most = (
        recover_seconds(recovery(steps=n, evaluations=1), SPEEDS) for n in (10, 20, 30)
    )
    assert most - more == pytest.approx(more - few) and more > few
    both = recover_seconds(recovery(steps=10, evaluations=1, minutes=60), SPEEDS)
    assert both == few
    full, lora = (recovery(steps=50, train=kind) for kind in ("full", "lora"))
    assert recover_seconds(full, SPEEDS) > recover_seconds(lora, SPEEDS)


def test_what_a_pass_keeps_grows_with_the_batch_unless_it_runs_twice() -> None:
    def bytes_(**options: Any) -> int:
        work = recovery(train="full", **options)
        return recover_bytes(work, dtype=torch.float32, on_gpu=False)[0]

    assert bytes_(batch=32) > bytes_(batch=16)
    assert bytes_(gradient_checkpointing=True) < bytes_()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("estimate")
    save_checkpoint(folder / "model")
    return folder / "model", write_text(folder)


def test_a_plan_counts_pruning_and_recovery(
    checkpoint: tuple[Path, Path], tmp_path: Path
) -> None:
    model, text = checkpoint
    prune = {"method": "taylor", "sparsity": 0.3, "round_to": 32}
    options = {"minutes": 2, "samples": 8, "held_out": 4, "sequence_length": 32}
    recover = {"method": "distill", "options": options}

    def planned(**changes: Any) -> Any:
        return compress.plan(config_of(model, text, tmp_path / "run", **changes))

    plain = planned()
    assert dict(plain.stages) == {}
    both = planned(prune=prune, recover=recover)
    assert list(both.stages) == ["prune", "recover"]
    assert both.stages["recover"].seconds >= 120
    assert both.seconds > plain.seconds + 120
    assert both.peak_memory_bytes >= max(
        stage.peak_memory_bytes for stage in both.stages.values()
    )
    stored = both.to_dict()["predicted"]["stages"]["prune"]
    assert set(stored) == {"seconds", "peak_memory_bytes", "device_memory_bytes"}
    assert stored["device_memory_bytes"] == 0
    assert "of which recover:" in both.text() and "of which prune:" in both.text()
    assert not (tmp_path / "run/pruned").exists()
