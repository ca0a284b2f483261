"""What GPTQ of a 405B dense and a 671B MoE model would take, from measured constants.

    python benchmarks/large_models.py

Nothing large is run: shapes times rates that ``results/gpu_quantize.json`` holds (a 7B
model on one GPU). Forward passes and moments are taken to go at the measured rate, and
to be split by the number of GPUs. The time of the codes has two readings, between which
the truth lies: it follows the columns (the loop over columns waits for kernels to
start, not for arithmetic), or it follows the operations. Matrices that are dealt whole
(experts) are split by GPUs; of one that all of them read, every GPU needs the factor,
and the loop over columns takes each of them as long.

The sum of a 7B run by these formulas is held against its measurement in the first row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from results import FOLDER, write_result

TOKENS, WINDOWS = 128 * 2048, 128
LINKS = {"NVLink, 300 GB/s": 300e9, "400 Gbit/s": 50e9, "25 Gbit/s": 3e9}
GPU_BYTES = {"80 GB": 80e9, "141 GB": 141e9}


@dataclass(frozen=True)
class Stack:
    """Matrices of a block that read one input.

    Attributes:
        rows: Of all of them.
        columns: Of the input.
        count: How many such stacks a block has.
        seen: Share of the tokens that reaches each.
    """

    rows: int
    columns: int
    count: int = 1
    seen: float = 1.0

    @property
    def weights(self) -> int:
        """Weights of all."""
        return self.rows * self.columns * self.count

    @property
    def solving(self) -> float:
        """Operations of factors and feedback of all."""
        cubes, squares = self.columns**3, self.rows * self.columns**2
        return self.count * (4 / 3 * cubes + 2 * squares)


@dataclass(frozen=True)
class Model:
    """Shape of a model.

    Attributes:
        label: Of the row.
        parameters: In all.
        hidden: Width.
        blocks: Stacks of a block, and how many such blocks there are.
    """

    label: str
    parameters: float
    hidden: int
    blocks: tuple[tuple[int, tuple[Stack, ...]], ...]

    def over(self, figure: Any) -> float:
        """Return a sum over all stacks of all blocks."""
        return float(sum(n * sum(map(figure, stacks)) for n, stacks in self.blocks))


LLAMA2 = Model(
    "7B (Llama 2)",
    6.74e9,
    4096,
    (
        (
            32,
            (
                Stack(3 * 4096, 4096),
                Stack(4096, 4096),
                Stack(2 * 11008, 4096),
                Stack(4096, 11008),
            ),
        ),
    ),
)
DENSE = Model(
    "405B dense (Llama 3.1)",
    405.9e9,
    16384,
    (
        (
            126,
            (
                Stack(16384 + 2 * 1024, 16384),
                Stack(16384, 16384),
                Stack(2 * 53248, 16384),
                Stack(16384, 53248),
            ),
        ),
    ),
)
_ATTENTION = (  # multi-head latent attention: two down, two up, and out
    Stack(1536 + 576, 7168),
    Stack(24576, 1536),
    Stack(32768, 512),
    Stack(7168, 16384),
)
MIXTURE = Model(
    "671B MoE (DeepSeek-V3)",
    671e9,
    7168,
    (
        (3, (*_ATTENTION, Stack(2 * 18432, 7168), Stack(7168, 18432))),
        (
            58,
            (
                *_ATTENTION,
                Stack(2 * 2048, 7168),
                Stack(7168, 2048),
                Stack(2 * 2048, 7168, 256, 8 / 256),
                Stack(7168, 2048, 256, 8 / 256),
            ),
        ),
    ),
)


def passes(model: Model) -> float:
    """Return operations of two forward passes, Gram and drift."""
    forward = model.over(lambda s: 4 * TOKENS * s.seen * s.weights)
    moments = model.over(
        lambda s: 2 * TOKENS * s.seen * s.count * (0.625 + 1) * s.columns**2
    )
    return forward + moments


def columns(model: Model, gpus: int) -> float:
    """Return the columns that one GPU loops over."""
    shared = model.over(lambda s: s.columns if s.count == 1 else 0)
    dealt = model.over(lambda s: s.columns * s.count if s.count > 1 else 0)
    return shared + dealt / gpus


def solving(model: Model, gpus: int) -> float:
    """Return operations of one GPU's share of factors and feedback."""
    dealt = model.over(lambda s: s.solving if s.count > 1 else 0)
    factors = model.over(lambda s: 4 / 3 * s.columns**3 if s.count == 1 else 0)
    feedback = model.over(lambda s: 2 * s.weights * s.columns if s.count == 1 else 0)
    return factors + (dealt + feedback) / gpus


def hours(model: Model, gpus: int, rates: dict[str, float]) -> dict[str, float]:
    """Return hours by part."""
    read = 2 * model.parameters / rates["bytes a second"]
    written = 4.25 / 8 * model.parameters / rates["bytes a second"]
    through = passes(model) / rates["passes, operations a second"] / gpus
    found = {
        "passes": through,
        "codes by columns": columns(model, gpus) * rates["codes, seconds a column"],
        "codes by operations": solving(model, gpus)
        / rates["codes, operations a second"],
        "reading the checkpoint": read,
        "export": read + written,
    }
    codes = (found["codes by columns"], found["codes by operations"])
    rest = through + read + read + written
    found |= {"in all, from": rest + min(codes), "to": rest + max(codes)}
    return {name: round(seconds / 3600, 2) for name, seconds in found.items()}


def memory(model: Model, gpus: int) -> dict[str, Any]:
    """Return bytes of one GPU and of the host."""
    widest = max(s.columns for _, stacks in model.blocks for s in stacks)
    busiest = max(
        7 * 4 * s.columns**2 + 2 * 4 * s.rows * s.columns
        for _, stacks in model.blocks
        for s in stacks
    )
    block = max(sum(2 * s.weights for s in stacks) for _, stacks in model.blocks)
    states = 2 * 2 * TOKENS * model.hidden
    peak = block + busiest
    return {
        "widest input": widest,
        "block in bf16, GB": round(block / 1e9, 1),
        "seven matrices of the widest, and its rows, GB": round(busiest / 1e9, 1),
        "both on a GPU, GB": round(peak / 1e9, 1),
        **{f"fits {name}": peak < size for name, size in GPU_BYTES.items()},
        "states of all windows, both models, GB": round(states / 1e9, 1),
        "of these a process, GB": round(states / gpus / 1e9, 1),
    }


def disks(model: Model) -> dict[str, float]:
    """Return gigabytes."""
    parts = {
        "checkpoint in bf16": 2.0,
        "codes in the work directory": 1 + 2 / 128,
        "export at 4.25 bits": 4.25 / 8,
        "level database, five schemes of 3 to 8 bits": sum((3, 4, 5, 6, 8)) / 8,
    }
    return {name: round(x * model.parameters / 1e9) for name, x in parts.items()}


def exchange(model: Model) -> dict[str, Any]:
    """Return what passes between processes, and how long that takes on a link."""
    sums = model.over(lambda s: 2 * 8 * s.count * s.columns**2)
    codes = model.over(lambda s: s.weights)
    total = sums + codes
    return {
        "moments, TB": round(sums / 1e12, 2),
        "codes, TB": round(codes / 1e12, 2),
        **{f"hours by {n}": round(total / v / 3600, 2) for n, v in LINKS.items()},
    }


def main() -> None:
    """Read the constants, write the plan."""
    measured = json.loads((FOLDER / "gpu_quantize.json").read_text())
    run = next(r for r in measured["figures"]["Runs"] if "INT4" in r["run"])
    codes = run["of quantize, codes s"]
    moved = run["checkpoint bytes"] + run["export bytes"]
    rates = {
        "passes, operations a second": passes(LLAMA2) / (run["quantize s"] - codes),
        "codes, seconds a column": codes / columns(LLAMA2, 1),
        "codes, operations a second": solving(LLAMA2, 1) / codes,
        "bytes a second": moved / run["export safetensors s"],
    }
    plans = [(LLAMA2, 1), (DENSE, 1), (DENSE, 8), (MIXTURE, 8), (MIXTURE, 64)]
    heads = [{"model": m.label, "GPUs": n} for m, n in plans]
    models = [LLAMA2, DENSE, MIXTURE]
    path = write_result(
        "large_models",
        claim="On paper, from a measured 7B run on one GPU: GPTQ INT4 on 128 x 2048 "
        "tokens of a 405B dense and a 671B MoE model; nothing of it was run.",
        figures={
            "measured on": f"{measured['figures']['GPU']}, {measured['date']}",
            **rates,
            "measured 7B, hours of the run": round(run["seconds"] / 3600, 3),
            "measured 7B, GB on the GPU": round(run["of these allocated"] / 1e9, 1),
            "Hours": [h | hours(*p, rates) for h, p in zip(heads, plans, strict=True)],
            "Memory": [h | memory(*p) for h, p in zip(heads, plans, strict=True)],
            "Disks, GB": [{"model": m.label} | disks(m) for m in models],
            "Exchange": [{"model": m.label} | exchange(m) for m in models],
        },
    )
    print(path)


if __name__ == "__main__":
    main()
