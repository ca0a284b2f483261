"""Rows of ``quality_suite.py``: what is compressed how, and who else does the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SAMPLES, LENGTH, SEED = 16, 512, 0


@dataclass(frozen=True)
class Row:
    """One compressed model: what the config says, and how inputs are rounded.

    Attributes:
        scheme: Of all linears.
        method: Quantizer.
        transforms: Exact transforms before it.
        rounding: What the measurement does to the inputs of linears.
        dense: Whether no stock loader holds the codes.
        options: Of the quantizer.
        alpha: Of SmoothQuant, where that is a transform.
        scales: Storage type of scales. llm-compressor's are float32 here, since it is
            handed a float32 model, and those of HQQ float16, so that rows beside them
            have these as well.
    """

    scheme: str
    method: str
    transforms: tuple[str, ...] = ()
    rounding: str | None = None
    dense: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    alpha: float | None = None
    scales: str = "auto"

    @property
    def label(self) -> str:
        """Transforms and method, as one word."""
        extra = [f"{k}={v}" for k, v in self.options.items()]
        if self.alpha is not None:
            extra += [f"alpha={self.alpha}"]
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
            for scheme in ("fp8", "nvfp4", "mxfp4", "fp4-g64")
            for m in ("rtn", "gptq")
        ),
    ]
    for scheme in ("fp4-g64-pow2", "fp4-g64-ratio"):
        found += [Row(scheme, m, dense=True) for m in ("rtn", "zeroquant_fp")]
        found += [Row(f"{scheme}-lorc8", "zeroquant_fp", dense=True)]
    for scheme in ("fp6-g64", "e3m0-g64"):
        found += [Row(scheme, m, dense=True) for m in ("rtn", "gptq")]
    return [*found, *_rows_that_round_inputs(), *_rows_beside_peers()]


def _rows_that_round_inputs() -> list[Row]:
    alphas = (0.5, 0.65, 0.8)
    smooth = ("smoothquant",)
    return [
        *(Row("fp8-w8a8", m, rounding="e4m3") for m in ("rtn", "gptq")),
        Row("w4a8-fp-g64-ratio", "zeroquant_fp", rounding="e4m3", dense=True),
        *(Row(s, m, rounding="int8") for s in _INT8 for m in ("rtn", "gptq")),
        Row("w8a8", "rtn", smooth, "int8", alpha=0.5),
        *(Row(s, "gptq", smooth, "int8", alpha=a) for s in _INT8 for a in alphas),
        Row("w6a8-g64-group", "gptq", rounding="int8-g64"),
        Row("w6a8-g64-group", "gptq", smooth, "int8-g64", alpha=0.5),
    ]


def _rows_beside_peers() -> list[Row]:
    f32 = "float32"
    return [
        *(Row("int4-g64", m, scales=f32) for m in ("rtn", "gptq", "awq")),
        Row("int4-g64", "gptq", ("awq",), scales=f32),
        Row("fp8-w8a8", "rtn", rounding="e4m3", scales=f32),
        *(
            Row("w8a8", "gptq", ("smoothquant",), "int8", alpha=a, scales=f32)
            for a in (0.65, 0.8)
        ),
        *(
            Row(f"int{b}-g64-{kind}", "hqq", scales="float16", dense=kind == "offset")
            for b in (4, 3)
            for kind in ("asym", "offset")
        ),
    ]


_INT8 = ("w8a8", "w6a8-g64")

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
            "samples": SAMPLES,
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
    if row.transforms:
        settings = {} if row.alpha is None else {"alpha": row.alpha}
        config["transforms"] = [
            {"name": name, **(settings if name == "smoothquant" else {})}
            for name in row.transforms
        ]
    return config
