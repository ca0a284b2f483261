"""Rows of ``quality_suite.py``: what is compressed how, and who else does the same."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

SAMPLES, LENGTH, SEED = 16, 512, 0
MORE = 64  # samples, where this few are what limits a scheme


@dataclass(frozen=True)
class Row:
    """One compressed model: what the config says.

    Attributes:
        scheme: Of all linears.
        method: Quantizer.
        transforms: Exact transforms before it.
        dense: Whether no stock loader holds the codes.
        options: Of the quantizer.
        alpha: Of SmoothQuant, where that is a transform.
        places: Of SmoothQuant, if not behind norms.
        samples: Of calibration.
        eight: Projections whose weights have 8 bits in place of a scheme's 6.
        upgrade: Whether ``quantize.upgrade_inputs`` is on.
        scales: Storage type of scales. llm-compressor's are float32 here, since it is
            handed a float32 model, and those of HQQ float16, so that rows beside them
            have these as well.
    """

    scheme: str
    method: str
    transforms: tuple[str, ...] = ()
    dense: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    alpha: float | None = None
    places: tuple[str, ...] = ("norm",)
    samples: int = SAMPLES
    eight: tuple[str, ...] = ()
    upgrade: bool = False
    scales: str = "auto"

    @property
    def label(self) -> str:
        """Transforms and method, as one word."""
        extra = [f"{k}={v}" for k, v in self.options.items()]
        if self.alpha is not None:
            extra += [f"alpha={self.alpha}"]
        if self.places != ("norm",):
            extra += [f"places={'/'.join(self.places)}"]
        if self.samples != SAMPLES:
            extra += [f"samples={self.samples}"]
        if self.eight:
            extra += [f"8 bits for {'/'.join(self.eight)}"]
        if self.upgrade:
            extra += ["upgrade_inputs"]
        if self.scales != "auto":
            extra += [f"scales={self.scales}"]
        return "+".join([*self.transforms, self.method, *extra])


def rows() -> list[Row]:
    """Return all rows of the table."""
    bits = (8, 6, 5, 4, 3, 2)
    found = [
        *(Row(f"int{b}-g64", m) for b in bits for m in ("rtn", "gptq")),
        Row("int4-g64", "awq"),
        *(Row("int4-g64", "gptq", (t,)) for t in ("awq", "rotation", "scale_folding")),
        Row("int4-g64", "rtn", ("rotation",)),
        *(Row("int4-g64-asym", m) for m in ("rtn", "hqq", "gptq")),
        *(Row("int3-g64-asym", m) for m in ("rtn", "hqq")),
        *(
            Row(scheme, m)
            for scheme in ("fp8", "nvfp4", "mxfp4", "mxfp6", "mxfp8", "fp4-g64")
            for m in ("rtn", "gptq")
        ),
    ]
    for scheme in ("fp4-g64-pow2", "fp4-g64-ratio"):
        found += [Row(scheme, m, dense=True) for m in ("rtn", "zeroquant_fp")]
        found += [Row(f"{scheme}-lorc8", "zeroquant_fp", dense=True)]
    for scheme in ("fp6-g64", "e3m0-g64"):
        found += [Row(scheme, m, dense=True) for m in ("rtn", "gptq")]
    return [
        *found,
        *_rows_that_round_inputs(),
        *_rows_with_more_text(),
        *_rows_beside_peers(),
    ]


def _rows_that_round_inputs() -> list[Row]:
    alphas = (0.5, 0.65, 0.8)
    smooth = ("smoothquant",)
    return [
        *(Row(s, m) for s in ("fp8-w8a8", _BLOCKS) for m in ("rtn", "gptq")),
        Row("w4a8-fp-g64-ratio", "zeroquant_fp", dense=True),
        *(Row(s, m) for s in _INT8 for m in ("rtn", "gptq")),
        Row("w8a8", "rtn", smooth, alpha=0.5),
        *(Row(s, "gptq", smooth, alpha=a) for s in _INT8 for a in alphas),
        Row("w6a8-g64-group", "gptq"),
        Row("w6a8-g64-group", "gptq", smooth, alpha=0.5),
    ]


def _rows_with_more_text() -> list[Row]:
    """Return how close 6-bit weights and 8-bit inputs come, and what limits them."""
    smooth, turned, both = ("smoothquant",), ("rotation",), ("rotation", "smoothquant")
    found = [
        *(Row("int6-g64", "gptq", t) for t in ((), turned)),
        *(Row(s, "gptq", smooth, alpha=0.65) for s in ("w8a8", "w6a8-g64-group")),
        Row("w8a8", "gptq", both, alpha=0.5, places=("neuron",)),
        Row("w6a8-g64", "gptq", turned, upgrade=True),
        *(Row(f"w6a8-g{g}-group", "gptq", turned) for g in (64, 32)),
        Row("w6a8-g64-group", "gptq", turned, eight=("q", "k", "v", "down")),
    ]
    return [replace(row, samples=MORE) for row in found]


def _rows_beside_peers() -> list[Row]:
    f32 = "float32"
    return [
        *(Row("int4-g64", m, scales=f32) for m in ("rtn", "gptq", "awq")),
        Row("int4-g64", "gptq", ("awq",), scales=f32),
        Row("fp8-w8a8", "rtn", scales=f32),
        *(
            Row("w8a8", "gptq", ("smoothquant",), alpha=a, scales=f32)
            for a in (0.65, 0.8)
        ),
        *(
            Row(f"int{b}-g64-{kind}", "hqq", scales="float16", dense=kind == "offset")
            for b in (4, 3)
            for kind in ("asym", "offset")
        ),
    ]


_INT8 = ("w8a8", "w6a8-g64")
_BLOCKS = "fp8-b64+e4m3-g64"  # fp8-block with 64 columns: 128 do not divide 576

# What a peer made, as RECIPE, and the row of ours that does the same job. HQQ stores a
# scale and a zero point in 16 bits each, 4.5 bits a weight in all, as "-offset" does;
# "-asym" takes 4.31.
PEERS = (
    ("rtn-int4", "int4-g64", "rtn+scales=float32"),
    ("gptq-int4", "int4-g64", "gptq+scales=float32"),
    ("awq-int4", "int4-g64", "awq+scales=float32"),
    ("awq-gptq-int4", "int4-g64", "awq+gptq+scales=float32"),
    ("rtn-nvfp4", "nvfp4", "rtn"),
    ("gptq-nvfp4", "nvfp4", "gptq"),
    ("rtn-mxfp4", "mxfp4", "rtn"),
    ("gptq-mxfp4", "mxfp4", "gptq"),
    ("rtn-fp8", "fp8-w8a8", "rtn+scales=float32"),
    ("gptq-w8a8", "w8a8", "smoothquant+gptq+alpha=0.8+scales=float32"),
    ("hqq-int4", "int4-g64-offset", "hqq+scales=float16"),
    ("hqq-int4", "int4-g64-asym", "hqq+scales=float16"),
    ("hqq-int3", "int3-g64-offset", "hqq+scales=float16"),
    ("hqq-int3", "int3-g64-asym", "hqq+scales=float16"),
)
PEER_ROUNDING = {"rtn-fp8": "e4m3", "gptq-w8a8": "int8"}


def config_of(row: Row, model: Path, workdir: Path, device: str) -> dict[str, Any]:
    """Return the config of one row."""
    entry: dict[str, Any] = {"format": "safetensors"}
    if row.dense:
        entry["dense"] = True
    config: dict[str, Any] = {
        "model": {"path": str(model)},
        "calibration": {
            "data": "mix",
            "samples": row.samples,
            "sequence_length": LENGTH,
            "seed": SEED,
        },
        "quantize": {
            "method": row.method,
            "scheme": row.scheme,
            "options": row.options,
            "scale_dtype": row.scales,
        },
        "export": [entry],
        "run": {
            "workdir": str(workdir),
            "device": device,
            "seed": SEED,
            "verify": row.method == "rtn" and not row.dense,
        },
    }
    if row.eight:
        pattern = f"re:.*({'|'.join(row.eight)})_proj"
        scheme = row.scheme.replace("w6", "w8")
        config["quantize"]["overrides"] = {pattern: {"scheme": scheme}}
    if row.upgrade:
        config["quantize"]["upgrade_inputs"] = {}
    if row.transforms:
        settings: dict[str, Any] = {"places": list(row.places)}
        if row.alpha is not None:
            settings["alpha"] = row.alpha
        config["transforms"] = [
            {"name": name, **(settings if name == "smoothquant" else {})}
            for name in row.transforms
        ]
    return config
