"""Which inputs 8 bits hurt, and what exact transforms do about it.

    python benchmarks/input_shares.py MODEL [--windows 2] [--device cuda]

Weights stay exact. For each kind of input (of q/k/v, of o, of gate/up, of down) the KL
that rounding it alone causes is estimated by ``calibration/input_sensitivity.py`` and
summed over blocks, with one scale a token and with one for 64 columns. Text is what no
calibration has seen: the last windows of three texts, 512 tokens of each. Transforms
are set by 16 x 512 tokens of the bundled mix, as in ``quality_suite.py``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from reference_kl import TEXTS, windows_of
from results import write_result
from torch import Tensor

from compress.calibration.data import load_tokens
from compress.calibration.input_sensitivity import sensitivities
from compress.config.loader import load_config
from compress.config.plugins import create_chain, create_quantizer
from compress.model.loading import open_model
from compress.model.streaming import StreamedModel
from compress.planning.input_upgrades import shared_inputs
from compress.planning.planner import make_plan
from compress.workdir import WorkDir

SCHEME, SEED = "w8a8-g64", 0
CHOICES: dict[str, list[Any]] = {
    "none": [],
    "smoothquant 0.65": [{"name": "smoothquant", "alpha": 0.65}],
    "smoothquant 0.65 at norms and neurons": [
        {"name": "smoothquant", "alpha": 0.65, "places": ["norm", "neuron"]}
    ],
    "rotation": ["rotation"],
    "rotation, then smoothquant 0.5 at neurons": [
        "rotation",
        {"name": "smoothquant", "alpha": 0.5, "places": ["neuron"]},
    ],
}
KINDS = {"q_proj": "q/k/v", "o_proj": "o", "gate_proj": "gate/up", "down_proj": "down"}


def shares(
    path: Path,
    transforms: list[Any],
    calibration: Tensor,
    windows: Tensor,
    device: str,
) -> list[dict[str, Any]]:
    """Return KL by kind of input, a row for each way of rounding."""
    config = load_config(
        {
            "model": {"path": str(path)},
            "transforms": transforms,
            "quantize": {"method": "rtn", "scheme": SCHEME},
        }
    )
    assert config.quantize is not None
    chain = create_chain(config.transform_entries, ())
    with tempfile.TemporaryDirectory() as folder:
        handle = open_model(str(path), cache=Path(folder))
        described = chain.describe(handle.description)
        plan = make_plan(
            config.quantize,
            described,
            scale_dtype=described.dtype,
            quantizer=create_quantizer,
        )
        source = chain.run(
            described,
            handle.source,
            plan,
            windows=calibration,
            workdir=WorkDir(Path(folder) / "work"),
            device=device,
        ).source
        model = StreamedModel(described, source, device=device)
        inputs = shared_inputs(plan, described)
        found = sensitivities(model, windows, inputs, seed=SEED)
    rows = []
    for mode in ("token", "group"):
        kl: dict[str, float] = defaultdict(float)
        for shared, modes in zip(inputs, found, strict=True):
            kl[KINDS[shared.layers[0].rpartition(".")[2]]] += modes[mode].kl
        rows.append({"scales": mode, **kl, "all": sum(kl.values())})
    return rows


def main() -> None:
    """Write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=2, help="of each text")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = open_model(str(arguments.model), cache=Path(folder)).tokenizer()
        texts = [windows_of(t, tokenizer)[-arguments.windows :, :512] for t in TEXTS]
    calibration = load_tokens(
        "mix", tokenizer, samples=16, sequence_length=512, seed=SEED
    ).tokens
    windows, table = torch.cat(texts), []
    for name, transforms in CHOICES.items():
        found = shares(
            arguments.model, transforms, calibration, windows, arguments.device
        )
        for row in found:
            table.append({"transforms": name, **row})
            print(table[-1], flush=True)
    path = write_result(
        "input_shares",
        claim=f"{arguments.model.name}: estimated KL in nats that 8-bit inputs alone "
        "cause, weights exact, summed over blocks, by kind of input.",
        figures={"8-bit inputs": table},
        seed=SEED,
    )
    print(path)


if __name__ == "__main__":
    main()
