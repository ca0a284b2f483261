"""The Python API: everything the command line does is one call.

    python examples/python_api.py [MODEL] [WORKDIR]

MODEL is a HF folder or id, a GGUF file, or (the default) a model that an installed
package ships. Takes some minutes on a CPU with the default.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import compress

TEXT = "wikitext2"


def run_a_config(model: str, workdir: Path, *, samples: int, length: int) -> Path:
    """Do what ``compress run`` does, with a dictionary in place of a YAML file."""
    config: dict[str, Any] = {
        "model": {"path": model},
        "calibration": {"samples": samples, "sequence_length": length},
        "quantize": {"method": "gptq", "scheme": "int4-g32"},
        "evaluate": {"perplexity": [TEXT], "windows": 2, "sequence_length": length},
        "export": [{"format": "safetensors"}],
        "run": {"workdir": workdir},
    }
    print(compress.plan(config).text())  # nothing is computed yet
    result = compress.run(config, overwrite=True)
    print(result.summary())
    print("KL to the base:", result.report["metrics"]["compressed"]["kl"])
    return result.workdir / "export" / "safetensors"


def convert(model: str, workdir: Path) -> Path:
    """Write any model as a dense HF folder: a config without ``quantize``."""
    config: dict[str, Any] = {
        "model": {"path": model},
        "export": [{"format": "safetensors"}],
        "run": {"workdir": workdir, "verify": False},
    }
    result = compress.run(config, overwrite=True)
    return result.workdir / "export" / "safetensors"


def quantize_in_memory(folder: Path, target: Path) -> float:
    """Quantize a transformers model that is in memory; returns the mean layer error."""
    model = compress.load(folder)  # an ordinary transformers model
    coded = compress.quantize(
        model,
        "int8-g64",
        method="rtn",
        options={"search": True},
        overrides={"re:.*mlp.*": {"scheme": "int4-g32"}},
    )
    coded.save(target)  # config and weights; pass tokenizer= above to save that too
    errors = [float(record["weight_error"]) for record in coded.records.values()]
    return sum(errors) / len(errors)


def main(model: str, workdir: Path, *, samples: int = 32, length: int = 256) -> None:
    """Run all parts of the example."""
    compressed = run_a_config(model, workdir / "run", samples=samples, length=length)
    dense = convert(model, workdir / "dense")

    # Any checkpoint can be measured, and compared with another. (A GGUF file would run
    # in llama.cpp, which rounds activations; two folders run in the same arithmetic.)
    metrics = compress.evaluate(
        compressed, base=dense, texts=[TEXT], windows=2, sequence_length=length
    )
    print("KL by compress.evaluate:", metrics["texts"][TEXT]["kl"])

    # Our own output loads as an ordinary model, codes decoded once.
    loaded = compress.load(compressed)
    print(type(loaded).__name__, "with", loaded.num_parameters(), "parameters")

    target = workdir / "in_memory"
    if target.exists():
        print(f"{target} is there already; delete it to write it again")
        return
    print("mean weight error:", quantize_in_memory(dense, target))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(
        arguments[0] if arguments else "builtin:smollm2-135m",
        Path(arguments[1] if len(arguments) > 1 else "runs/python_api"),
    )
