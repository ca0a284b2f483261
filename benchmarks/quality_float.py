"""Small floats, kinds of scale and low-rank corrections: KL on one model, no export.

    python benchmarks/quality_float.py [--model DIR] [--device cuda] [--only REGEX]

The model is ``permuted`` of ``offgrid.py`` (SmolLM2-135M); all linears of the decoder;
calibration 16 x 512 tokens of the bundled mix. Each row is a ``compress.run``; its
codes are decoded into a dense transformers model, which is compared with the original
on ten windows of 1024 tokens of three texts that no calibration has seen, as
``reference_kl.py`` does. ``rtn`` stands for round to nearest with scales of each
group's range, ``rtn search`` for scales of least squared error.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path
from typing import Any

import offgrid
import torch
from reference_kl import TEXTS, divergence, load, log_softmax, windows_of
from results import write_result
from torch import Tensor
from transformers import AutoTokenizer

import compress
from compress.core.plan import Plan
from compress.model.loading import open_model
from compress.transform import part_of_layer
from compress.workdir import WorkDir

SCHEMES = (
    *("int4-g64", "fp4-g64", "fp4-g64-pow2", "fp4-g64-ratio"),
    *("e3m0-g64", "nvfp4", "mxfp4", "fp6-g64"),
)
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "rtn search": {"method": "rtn", "options": {"search": True}},
    "gptq": {"method": "gptq"},
}
_ROUNDING = "zeroquant_fp, scale_rounding "
ROUNDINGS = {
    f"{_ROUNDING}{how}": {"method": "zeroquant_fp", "options": {"scale_rounding": how}}
    for how in ("ceil", "nearest")  # mse is what gptq does
}
ROWS = [
    *((s + r, m) for s in SCHEMES for r in ("", "-lorc8") for m in METHODS),
    *((s, m) for s in SCHEMES[2:4] for m in ROUNDINGS),
    *(("fp8", "rtn"), ("mxfp6", "gptq"), ("int4-g64-lorc32", "gptq")),
    *(("int3-g64", "gptq"), ("int3-g64-lorc8", "gptq")),
]


class Ruler:
    """The original, its log-probabilities, and a dense model to put weights into."""

    @torch.no_grad()
    def __init__(self, model: Path, device: str) -> None:
        self.model = load(model).to(device)
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.windows = {t: windows_of(t, tokenizer).to(device) for t in TEXTS}
        self.base = {
            text: [log_softmax(self.model, w) for w in windows]
            for text, windows in self.windows.items()
        }

    @torch.no_grad()
    def kl(self, weights: dict[str, Tensor]) -> dict[str, float]:
        """Return the KL of each text with some weights replaced."""
        for name, values in weights.items():
            self.model.get_submodule(name).weight.copy_(values)
        found = {}
        for text, windows in self.windows.items():
            pairs = zip(windows, self.base[text], strict=True)
            parts = [divergence(p, log_softmax(self.model, w))[0] for w, p in pairs]
            found[text] = sum(parts) / len(parts)
        return found


def quantized(
    model: Path, scheme: str, method: dict[str, Any], work: Path, device: str
) -> dict[str, Tensor]:
    """Return the decoded weights of one run."""
    config = {
        "model": {"path": str(model)},
        "calibration": {"data": "mix", "samples": 16, "sequence_length": 512},
        "quantize": {"scheme": scheme, **method},
        "run": {"workdir": str(work), "device": device},
    }
    compress.run(config, overwrite=True)
    workdir = WorkDir(work)
    plan = Plan.from_json((work / "plan.json").read_text())
    description = open_model(str(model), cache=workdir.assets).description
    return {
        layer: workdir.read_layer(part_of_layer(layer, description), layer).dequantize()
        for layer in plan.layers
    }


def main() -> None:
    """Make and measure every row, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="instead of making it")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="schemes that match")
    arguments = parser.parse_args()
    model = arguments.model or arguments.work / "offgrid" / "permuted"
    if not model.exists():
        offgrid.main(arguments.work / "offgrid")
    ruler, rows = Ruler(model, arguments.device), []
    for scheme, label in ROWS:
        if not re.search(arguments.only, scheme):
            continue
        folder = arguments.work / "float"
        method = {**METHODS, **ROUNDINGS}[label]
        weights = quantized(model, scheme, method, folder, arguments.device)
        shutil.rmtree(folder)
        figures = {text: round(kl, 4) for text, kl in ruler.kl(weights).items()}
        rows.append({"scheme": scheme, "method": label, **figures})
        print(rows[-1], flush=True)
    write_result("quality_float", claim=CLAIM, figures={"KL in nats": rows})


CLAIM = (
    "SmolLM2-135M (permuted), 16 x 512 tokens of the bundled mix, KL to bf16 over 10 "
    "windows of 1024 tokens: FP4 beats INT4 as rounded and E3M0 always; row ratios "
    "(M2) beat powers of two (M1); exponents chosen by error beat all roundings; a "
    "low-rank correction of rank 8 never makes it worse."
)


if __name__ == "__main__":
    main()
