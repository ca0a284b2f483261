"""KL to F16 and perplexity of GGUF files inside stock llama.cpp, as users run them.

    python benchmarks/gguf_score.py FOLDER MODEL FILE.gguf ...

``FOLDER`` holds ``f16.gguf`` of a model, ``MODEL`` is its checkpoint, whose tokenizer
cuts the texts. Twelve windows of 512 tokens of each of three texts that no
calibration has seen; scores count the second half of a window, where a token has 256
others before it (llama.cpp's own tools do the same). Scores lie in
``FOLDER/scores.json`` by SHA-256 of a file, so a call that was stopped goes on where it
was. Log-probabilities of the F16 file take 1.8 GB in ``FOLDER/base``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from reference_kl import TEXTS, divergence
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from compress.evaluation.texts import evaluation_text
from compress.export.gguf_runtime import llamacpp_logits
from compress.workdir import write_atomically

WINDOWS, LENGTH = 12, 512
SCORED = slice(LENGTH // 2, LENGTH - 1)  # positions that predict a token of the window


@dataclass
class Scorer:
    """Scores of files against the F16 file of their model.

    Attributes:
        folder: Holds ``f16.gguf``; scores and log-probabilities go there.
        windows: int64 ``[12, 512]`` tokens by text.
    """

    folder: Path
    windows: dict[str, Tensor]

    @classmethod
    def of(cls, folder: Path, model: Path) -> Scorer:
        """Return a scorer with the tokens of a checkpoint's tokenizer."""
        tokenizer = AutoTokenizer.from_pretrained(model)
        windows = {}
        for name in TEXTS:
            text = evaluation_text(name).joined
            ids = tokenizer(text, verbose=False)["input_ids"][: WINDOWS * LENGTH]
            windows[name] = torch.tensor(ids).view(WINDOWS, LENGTH)
        return cls(folder, windows)

    def score(self, path: Path) -> dict[str, Any]:
        """Return bytes, and for each text ``{kl, kl_se, top1, perplexity}``."""
        digest = _digest(path)
        known = self._known()
        if digest not in known:
            texts = {name: self._measure(path, name) for name in self.windows}
            row = {"file": path.name, "bytes": path.stat().st_size, "texts": texts}
            known = {**self._known(), digest: row}
            data = json.dumps(known, indent=1).encode()
            write_atomically(self.folder / "scores.json", data)
        return known[digest]  # type: ignore[no-any-return]

    def _known(self) -> dict[str, Any]:
        path = self.folder / "scores.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def _measure(self, path: Path, text: str) -> dict[str, float]:
        figures, losses = [], []
        base = self._base(text)
        found = _log_probabilities(path, self.windows[text])
        for window, kept, q in zip(self.windows[text], base, found, strict=True):
            figures.append(divergence(torch.from_numpy(kept.copy()), q))
            following = window[SCORED.start + 1 : SCORED.stop + 1, None]
            losses.append(float(-q.gather(1, following).double().mean()))
        kl, top1 = torch.tensor(figures, dtype=torch.float64).T
        return {
            "kl": float(kl.mean()),
            "kl_se": float(kl.std() / math.sqrt(len(kl))),
            "top1": float(top1.mean()),
            "perplexity": math.exp(sum(losses) / len(losses)),
        }

    def _base(self, text: str) -> Any:
        """Return float32 ``[12, 255, V]`` log-probabilities of the F16 file."""
        base = self.folder / "f16.gguf"
        path = self.folder / "base" / f"{text}-{_digest(base)[:16]}.npy"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            rows = [q.numpy() for q in _log_probabilities(base, self.windows[text])]
            partial = path.with_suffix(".part.npy")
            numpy.save(partial, numpy.stack(rows))
            partial.rename(path)
        return numpy.load(path, mmap_mode="r")


def _log_probabilities(path: Path, windows: Tensor) -> Iterator[Tensor]:
    rows = llamacpp_logits(path, windows)
    for logits in tqdm(rows, desc=path.name, total=len(windows), leave=False):
        yield logits[SCORED].log_softmax(-1)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Print the scores of files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with f16.gguf")
    parser.add_argument("model", type=Path, help="checkpoint, for its tokenizer")
    parser.add_argument("files", type=Path, nargs="+")
    arguments = parser.parse_args()
    scorer = Scorer.of(arguments.folder, arguments.model)
    for path in arguments.files:
        row = scorer.score(path)
        figures = (f"{t} {s['kl']:.4f}" for t, s in row["texts"].items())
        print(f"{path} {row['bytes']:,} bytes; KL {', '.join(figures)}", flush=True)


if __name__ == "__main__":
    main()
