r"""lm-evaluation-harness on any checkpoint of ours, as it is served.

Importing this module registers the model ``compress``; running it is the harness's own
command with that model known::

    python -m compress.lm_eval_adapter run --model compress \
        --model_args pretrained=runs/mine/export/gguf/model.gguf --tasks arc_easy

GGUF files run in llama.cpp on the CPU, everything else in torch: log-likelihoods block
by block, generation (greedy only) on the whole model with decoded weights. Inputs and
cache are rounded in both where the config of a folder says so.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from compress.core.errors import ConfigError, MissingDependencyError
from compress.evaluation.tasks import cut
from compress.model.devices import choose_device
from compress.subject import Subject

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise MissingDependencyError(
        "lm-eval", extra="eval", purpose="the adapter for lm-evaluation-harness"
    ) from error

_log = logging.getLogger(__name__)

_Encoded = tuple[tuple[str, str] | None, list[int], list[int]]
"""Texts of context and continuation, and the tokens of each."""


@register_model("compress")
class CompressLM(TemplateLM):  # type: ignore[misc]
    """A checkpoint as a model of lm-evaluation-harness.

    Args:
        pretrained: HF folder or id, GGUF file, work directory, ``builtin:NAME``.
        device: Where torch runs: ``auto``, ``cpu`` or ``cuda``.
        max_length: Tokens of a sequence at most; the model's own limit if absent.
        **_others: What the harness gives to all models, such as ``batch_size``: how
            much is computed at once is decided here.

    Raises:
        CompressError: The checkpoint cannot be opened.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = "auto",
        max_length: int | None = None,
        **_others: Any,
    ) -> None:
        super().__init__()
        self._cache = tempfile.TemporaryDirectory(prefix="compress-lm-eval-")
        self._device = _device(device)
        self._subject = Subject(
            pretrained, name="model", device=self._device, cache=Path(self._cache.name)
        )
        self.tokenizer = self._subject.handle.tokenizer()
        own = int(self._subject.config["max_position_embeddings"])
        self.max_length = int(max_length or own)

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Token before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness keeps prompts of this tokenizer."""
        return str(self._subject.path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the tokens of a text; BOS as the tokenizer does, unless told."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        ids: list[int] = self.tokenizer(
            string, add_special_tokens=add_special_tokens, verbose=False
        )["input_ids"]
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a chat as text, by the tokenizer's template."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[_Encoded], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness; neighbours of one context share it."""
        groups = [
            [
                cut([*context, *rest], len(context), self.max_length)
                for _, context, rest in group
            ]
            for _, group in groupby(requests, key=lambda request: request[1])
        ]
        found = self._subject.likelihoods(groups)
        return [(one.nats, one.is_greedy) for group in found for one in group]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, cut into disjoint windows."""
        windows: list[_Encoded] = []
        owners: list[int] = []
        for index, (text,) in enumerate(request.args for request in requests):
            cuts = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, rest in map(make_disjoint_window, cuts):
                windows.append((None, context, rest))
                owners.append(index)
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows)
        for index, (nats, _) in zip(owners, scored, strict=True):
            totals[index] += nats
        return totals

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Return greedy answers, each up to the first of its stop strings.

        Raises:
            ConfigError: A task wants sampling.
        """
        answers: list[str] = []
        for options, group in groupby(requests, key=lambda request: request.args[1]):
            stops, most = _limits(options)
            room = max(1, self.max_length - most)
            prompts = [self.tok_encode(r.args[0])[-room:] for r in group]
            for ids in self._subject.answers(prompts, most=most, stops=stops):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                answers.append(_before(text, stops))
        return answers


def _device(wanted: str | None) -> str:
    """Return where torch runs; the harness asks for ``cuda:0`` if nobody says."""
    import torch

    if wanted and wanted.startswith("cuda") and not torch.cuda.is_available():
        _log.warning(
            "there is no CUDA device for %s; the model runs on the CPU", wanted
        )
        return "cpu"
    return choose_device(wanted or "auto")


def _limits(options: dict[str, Any]) -> tuple[list[str], int]:
    """Return stop strings and most tokens of a request's options."""
    if options.get("do_sample") and options.get("temperature", 1.0):
        raise ConfigError("generation is greedy; set do_sample to false in the task")
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else [text for text in until if text]
    return stops, int(options.get("max_gen_toks") or 256)


def _before(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of the stop strings in it."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
