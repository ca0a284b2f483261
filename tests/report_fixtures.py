"""Made-up runs and sweeps for tests of the report: every figure is invented."""

from __future__ import annotations

import math
import random
from typing import Any

from compress.report.front import with_front

SHAPES = {
    "q": (576, 576),
    "k": (192, 576),
    "v": (192, 576),
    "o": (576, 576),
    "gate": (1536, 576),
    "up": (1536, 576),
    "down": (576, 1536),
}
PATHS = {role: f"self_attn.{role}_proj" for role in "qkvo"} | {
    role: f"mlp.{role}_proj" for role in ("gate", "up", "down")
}
MIB = 2**20


def sample_layers(blocks: int) -> list[dict[str, Any]]:
    chance = random.Random(0)
    layers = []
    for block in range(blocks):
        for index, (role, (rows, columns)) in enumerate(SHAPES.items()):
            depth = abs(block - blocks / 2) / blocks
            error = 0.0006 * 1.6**index * (1 + 2 * depth) * chance.uniform(0.7, 1.4)
            layers.append(
                {
                    "name": f"model.layers.{block}.{PATHS[role]}",
                    "block": block,
                    "role": role,
                    "method": "gptq",
                    "scheme": "int4-g32",
                    "shape": [rows, columns],
                    "bits_per_weight": 4.5,
                    "bytes_before": rows * columns * 2,
                    "bytes_after": rows * columns * 9 // 16,
                    "error": error,
                    "weight_error": 0.006 * chance.uniform(0.8, 1.25),
                    "seconds": chance.uniform(0.1, 0.6),
                    "notes": [],
                }
            )
    return layers


def sample_text(kl: float, perplexity: float, chance: random.Random) -> dict[str, Any]:
    edges = [0.0] + [10 ** (-6 + 7 * i / 40) for i in range(41)]
    centre = math.log10(kl) - 0.4
    counts = [
        round(900 * math.exp(-0.5 * ((-6 + 7 * (i - 0.5) / 40 - centre) / 0.7) ** 2))
        for i in range(41)
    ]
    return {
        "protocol": "llamacpp512",
        "tokens": 10200,
        "perplexity": perplexity,
        "perplexity_se": perplexity * 0.017,
        "ppl_ratio": 1 + kl * chance.uniform(0.9, 1.1),
        "bits_per_byte": 0.24 * math.log(perplexity) * 1.44,
        "kl": kl,
        "kl_se": kl * 0.02,
        "kl_median": kl * 0.4,
        "kl_p90": kl * 2.4,
        "kl_p95": kl * 3.6,
        "kl_p99": kl * 8,
        "kl_p999": kl * 22,
        "kl_max": kl * 60,
        "top1": 1 - math.sqrt(kl) * 0.33,
        "top1_se": 0.003,
        "flips": math.sqrt(kl) * 0.12,
        "dp_rms": math.sqrt(kl) * 0.17,
        "kl_histogram": {"edges": edges, "counts": counts},
    }


def sample_metrics() -> dict[str, Any]:
    chance = random.Random(1)
    texts = {
        "wikitext2": sample_text(0.0874, 19.61, chance),
        "dialogue": sample_text(0.0412, 31.20, chance),
        "code_python": sample_text(0.0093, 4.38, chance),
    }
    base = {
        name: {
            "protocol": text["protocol"],
            "tokens": text["tokens"],
            "perplexity": text["perplexity"] / text["ppl_ratio"],
            "perplexity_se": text["perplexity_se"],
            "bits_per_byte": text["bits_per_byte"] * 0.98,
        }
        for name, text in texts.items()
    }
    first = texts["wikitext2"]
    return {
        "base": {"perplexity": base["wikitext2"]["perplexity"], "texts": base},
        "compressed": {
            "perplexity": first["perplexity"],
            "kl": first["kl"],
            "top1": first["top1"],
            "texts": texts,
        },
    }


def sample_exports() -> dict[str, Any]:
    verified = {"kl": 2.4e-6, "top1": 0.9993, "tokens": 2048, "limit": 1e-3}
    return {
        "gguf": {
            "files": ["export/gguf/made-up-135m-int4-g32.gguf"],
            "size_bytes": sum(sample_breakdown()["gguf"].values()),
            "notes": ["token_embd is q8_0: 1,769,472 groups of 32"],
            "verify": verified | {"consumer": "llama.cpp", "passed": True},
            "codes": {"layers": 210, "identical": True},
        },
        "safetensors": {
            "files": [
                "export/safetensors/model.safetensors",
                "export/safetensors/config.json",
                "export/safetensors/tokenizer.json",
            ],
            "size_bytes": sum(sample_breakdown()["safetensors"].values()),
            "notes": [],
            "verify": verified | {"consumer": "transformers", "passed": True},
            "codes": {"layers": 210, "identical": True},
        },
    }


def sample_breakdown() -> dict[str, dict[str, int]]:
    def parts(embedding: float, attention: float, mlp: float) -> dict[str, int]:
        sizes = {"embedding": embedding, "attention": attention, "mlp": mlp}
        return {name: int(value * MIB) for name, value in sizes.items()} | {
            "other": 70_000
        }

    return {
        "base": parts(54, 50.6, 151.9),
        "gguf": parts(28.7, 14.2, 42.7),
        "safetensors": parts(54, 14.2, 42.7),
    }


def sample_provenance() -> dict[str, Any]:
    config = "model: {path: made-up/135m}\nquantize: {method: gptq, scheme: int4-g32}\n"
    return {
        "config": {"run": {"workdir": "runs/sample"}},
        "config_text": config + "export: [{format: gguf}, {format: safetensors}]\n",
        "command": "compress run examples/sample.yaml --set run.seed=0",
        "seed": 0,
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"compress": "0.0", "torch": "0.0", "python": "3.0"},
        "hashes": {"model": "0" * 64, "calibration": "1" * 64, "config": "2" * 64},
        "hardware": {"cpu": "made-up CPU", "cores": 2, "memory_bytes": 2**34},
    }


def sample_costs() -> dict[str, Any]:
    breakdown = sample_breakdown()
    sizes = {name: sum(parts.values()) for name, parts in breakdown.items()}
    bits = {"base": 16.0, "linears": 4.5, "gguf": 5.34, "safetensors": 6.92}
    predicted = {"gguf": sizes["gguf"], "safetensors": sizes["safetensors"]}
    return {
        "size_bytes": sizes,
        "bits_per_weight": bits,
        "size_breakdown": breakdown,
        "seconds": {"load": 2.1, "calibrate": 92.0, "quantize": 61.5, "export": 6.4},
        "peak_memory_bytes": 1_700_000_000,
        "predicted": {
            "peak_memory_bytes": 1_900_000_000,
            "seconds": 260,
            "size_bytes": predicted,
        },
    }


def sample_report(blocks: int = 30) -> dict[str, Any]:
    return {
        "version": 1,
        "model": {
            "label": "made-up-135m (test data)",
            "family": "llama",
            "model_type": "llama",
            "parameters": 134_515_008,
            "dtype": "float16",
            "blocks": blocks,
            "path": "made-up/135m",
        },
        **sample_provenance(),
        "calibration": {
            "data": "mix",
            "samples": 128,
            "sequence_length": 512,
            "tokens": 65536,
            "dtype": "bfloat16",
        },
        **sample_costs(),
        "metrics": sample_metrics(),
        "layers": sample_layers(blocks),
        "exports": sample_exports(),
        "one_plan_two_files": {"layers": 210, "identical": True},
        "warnings": [
            "the bundled model was stored in 4 bits: its base is not original"
        ],
    }


def full_report(blocks: int = 30) -> dict[str, Any]:
    """Return a report of a run that pruned, trained, searched, tuned and wrote."""
    report = sample_report(blocks)
    chance = random.Random(2)
    units = []
    for layer in report["layers"]:
        bits = chance.choice([3.4375, 4.5, 4.5, 5.5, 8.5])
        rows, columns = layer["shape"]
        scheme = {3.4375: "q3_k", 4.5: "q4_0", 5.5: "q5_0", 8.5: "q8_0"}[bits]
        layer.update(bits_per_weight=bits, scheme=scheme)
        layer["bytes_after"] = round(rows * columns * bits / 8)
        loss = chance.uniform(1e-5, 1e-3)
        choices = [
            {
                "scheme": name,
                "bytes": rows * columns * width / 8,
                "error": loss / width,
                "loss": loss * 4.0 ** (3.4375 - width),
            }
            for name, width in (
                ("q3_k", 3.4375),
                ("q4_0", 4.5),
                ("q5_0", 5.5),
                ("q8_0", 8.5),
            )
        ]
        chosen = [c["scheme"] for c in choices].index(scheme)
        unit = {"layers": [layer["name"]], "weights": rows * columns}
        units.append({**unit, "chosen": chosen, "choices": choices})
    report["layers"][3]["notes"] = ["damped by 0.04 of the mean diagonal"]
    report["allocation"] = {
        "method": "evolution",
        "format": "gguf",
        "budget_bytes": 90_000_000,
        "file_bytes": 89_700_000,
        "fixed_bytes": 29_000_000,
        "predicted_kl": 0.041,
        "measured_kl": 0.05,
        "evaluations": 40.0,
        "history": [
            {"evaluations": 4.0 * i, "best": 0.5 * 0.7**i + 0.05, "note": f"step {i}"}
            for i in range(11)
        ],
        "seconds": {"levels": 61.0, "search": 12.0},
        "notes": ["q2_k: no layer has rows of 256 columns' multiples"],
        "units": units,
    }
    training = {
        "steps": 400,
        "best_step": 360,
        "tokens": 3_276_800,
        "seconds": 180.0,
        "kl_before": 0.43,
        "kl_after": 0.31,
        "layers": 210,
        "evaluations": [
            {"step": 40 * i, "seconds": 18.0 * i, "kl": 0.31 + 0.12 * 0.7**i}
            | ({"loss": 0.35 + 0.2 * 0.7**i} if i else {})
            for i in range(11)
        ],
    }
    report["pruning"] = {
        "method": "cfsp",
        "neurons": {"before": 46080, "after": 38400},
        "parameters": {"before": 134_515_008, "after": 121_243_968},
        "blocks": [
            {"block": i, "before": 1536, "after": 1280, "error": 0.02 + 0.001 * i}
            for i in range(blocks)
        ],
    }
    report["recovery"] = {"method": "distill", **training}
    report["tuning"] = {"method": "pv", "options": {"regime": "pv"}, **training}
    report["samples"] = {
        "tokens": 40,
        "prompts": [
            {
                "prompt": "Once upon a time",
                "texts": {
                    "base": " there was a clock <that> never stopped.",
                    "compressed": " there was a clock that ran backwards.",
                },
                "same_tokens": {"compressed": 5},
            },
            {
                "prompt": "def is_prime(n):\n    ",
                "texts": dict.fromkeys(
                    ("base", "compressed"), "return n > 1 and all(\n        n % i"
                ),
                "same_tokens": {"compressed": 40},
            },
        ],
    }
    return report


def full_sweep() -> dict[str, Any]:
    """Return a sweep of two models in four sizes, timed, beside another tool's file."""
    points = [
        {
            "name": f"{size}MB-{model}",
            "model": f"made-up/{model}",
            "size": f"{size}MB",
            "settings": {"model.path": f"made-up/{model}"},
            "budget_bytes": size * 1_000_000 + 1000,
            "bytes": size * 1_000_000,
            "text": "wikitext2",
            "kl": 0.9 * 0.97**size / scale,
            "kl_se": 0.001,
            "top1": 0.9,
            "ppl_ratio": 1.1,
            "bits_per_byte": 0.9 / scale**0.3 + 8 / size,
            "tokens_per_second": 4000 / size,
            "seconds": 61.0,
            "original": {"bytes": 270_000_000 * scale, "bits_per_byte": 0.9 / scale},
            "failures": [],
        }
        for model, scale in (("135m", 1), ("360m", 2))
        for size in (80 * scale, 95 * scale, 110 * scale, 140 * scale)
    ]
    return {
        "config": {"fits": ["1GB", "100MB"]},
        "command": "compress sweep made_up.yaml",
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"compress": "0.0"},
        "points": with_front(points),
        "foreign": [{"name": "Q4_K_M", "bytes": 105_000_000, "kl": 0.04}],
        "is_complete": True,
    }
