"""A model that is measured as its users run it: opened and checked, not loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from compress import provenance
from compress.core.continuations import Continuation, Likelihood
from compress.core.errors import CompressError
from compress.evaluation.generations import continue_greedily, round_inputs_
from compress.evaluation.likelihood import likelihoods
from compress.evaluation.measure import Predictor
from compress.model.loading import end_tokens, locate, open_model
from compress.model.streaming import StreamedModel
from compress.recovery.models import WholeModel
from compress.scoring import checkpoint_of, inspect, predictor_of, streamed
from compress.served_folder import served_as

_TOGETHER = 16
"""Prompts that are answered together in torch."""


class Subject:
    """A checkpoint and what runs it.

    GGUF files run in llama.cpp on the CPU, everything else block by block in torch, in
    float32, with inputs and cache rounded where its config says so.

    Args:
        path: HF folder or id, GGUF file, work directory of a run, ``builtin:NAME``.
        name: For progress bars and tables.
        is_exact: Run it in torch and round nothing, as a base must be.
        device: Where torch runs.
        cache: Folder for tokenizer files that are made from a GGUF file.

    Raises:
        CheckpointError: It is missing, damaged or incomplete.
        ExportError: llama.cpp refuses the file.
        MissingDependencyError: It is a GGUF file and llama-cpp-python is missing.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str,
        is_exact: bool = False,
        device: str = "cpu",
        cache: Path,
    ) -> None:
        self.name, self.path = name, checkpoint_of(path)
        self.file = locate(self.path)
        self.handle = open_model(self.path, cache=cache)
        self.in_llamacpp = self.file.suffix == ".gguf" and not is_exact
        self.is_exact = is_exact
        self._device = device
        self._served = None if is_exact else served_as(self.handle)
        self._streamed()  # all weights are there
        if self.in_llamacpp:
            from compress.export.gguf_runtime import llamacpp_tokens

            llamacpp_tokens(self.file, self.name)  # the file can be opened

    def _streamed(self) -> StreamedModel:
        return streamed(self.handle, self._served, device=self._device)

    @property
    def config(self) -> dict[str, Any]:
        """Config of the architecture."""
        return dict(self.handle.description.config)

    @property
    def rounds_inputs(self) -> bool:
        """Whether inputs of layers or the cache are rounded."""
        return self._served is not None and self._served.is_more_than_weights

    @cached_property
    def identity(self) -> str:
        """Digest of the model and of what runs it."""
        known = provenance.model_digest(self.handle.description, self.file)
        place = "llama.cpp" if self.in_llamacpp else f"torch on {self._device}"
        return provenance.digest_of([known, place, self.is_exact])

    @property
    def logits(self) -> Predictor:
        """What runs windows of tokens."""
        if self._served is None:
            return self._streamed().logits
        return predictor_of(self.handle, self.name, self._served, device=self._device)

    def likelihoods(
        self, groups: Sequence[Sequence[Continuation]]
    ) -> list[list[Likelihood]]:
        """Return the likelihood of each continuation of each context."""
        if self.in_llamacpp:
            from compress.export.gguf_runtime import llamacpp_scores

            return list(llamacpp_scores(self.file, groups))
        return likelihoods(self._streamed(), groups, name=self.name)

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        most: int,
        stops: Sequence[str] = (),
    ) -> list[list[int]]:
        """Return what the model writes greedily after each prompt, as tokens.

        In torch the whole model is in memory, in float32, and stays there; inputs and
        cache are rounded where its config says so.

        Args:
            prompts: Token ids, at least one each.
            most: Tokens of an answer at most.
            stops: An answer may end once its text holds one of these; what follows
                them is not cut off.

        Raises:
            CompressError: The whole model does not fit the device.
        """
        if self.in_llamacpp:
            from compress.export.gguf_runtime import llamacpp_generate

            return list(llamacpp_generate(self.file, prompts, most=most, stops=stops))
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), _TOGETHER):
            part = order[start : start + _TOGETHER]
            rows = continue_greedily(
                self._whole,
                [prompts[index] for index in part],
                tokens=most,
                ends=self._ends,
                is_enough=self._is_enough(stops),
                new_cache=self._served.new_cache if self._served else None,
                name=self.name,
            )
            found |= dict(zip(part, rows, strict=True))
        return [found[index] for index in range(len(prompts))]

    @cached_property
    def _whole(self) -> WholeModel:
        try:
            model = WholeModel(self.handle, device=self._device, dtype=torch.float32)
        except torch.OutOfMemoryError as error:
            raise CompressError(
                f"{self.path}: writing text needs the whole model in float32, which "
                f"does not fit {self._device}: {error}"
            ) from error
        round_inputs_(model.module, self._served.rounding if self._served else {})
        return model

    def release(self) -> None:
        """Forget the whole model, if answers were written."""
        vars(self).pop("_whole", None)

    @cached_property
    def _ends(self) -> frozenset[int]:
        return end_tokens(self.handle)

    def _is_enough(
        self, stops: Sequence[str]
    ) -> Callable[[Sequence[int]], bool] | None:
        if not stops:
            return None
        tokenizer = self.handle.tokenizer()
        return lambda ids: any(stop in tokenizer.decode(ids) for stop in stops)

    def facts(self) -> dict[str, Any]:
        """Return name, size and bits, everything in the files included."""
        inspection = inspect(self.path)
        return {
            "name": self.name,
            "path": self.path,
            "runs_in": "llama.cpp" if self.in_llamacpp else "torch",
            "parameters": inspection.parameters,
            "size_bytes": inspection.size_bytes,
            "bits_per_weight": inspection.bits_per_weight,
        }
