"""Low-rank changes of the linear layers (LoRA), with a rank for each block.

W' = W + s B A, with A ``[r, C]`` random, B ``[R, r]`` zero and s = alpha / r = 2. The
adapters are peft's; here are the ranks, the learning rates, and the merge.

Ranks (importance-guided LoRA): a block of importance s_l gets r_l = r s_l / mean(s),
within [r / 4, 4 r], in even numbers whose mean is r. Rates (LoRA+): B learns faster
than A by a fixed ratio. The merge is computed in float32 and rounded once.

Source: Hu et al. (2021), arXiv 2106.09685; Hayou et al. (2024), LoRA+, arXiv
2402.12354; Wang et al. (2024), CFSP, arXiv 2409.13199, for ranks that follow
importance: its release has no code of the split, so the formula is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.core.errors import ConfigError, MissingDependencyError
from compress.model.loading import ModelHandle
from compress.recovery.models import WholeModel
from compress.recovery.trained import Trained, norm_weights, promote_

ALPHA = 2
"""Alpha over rank: what the product of the factors is multiplied by."""
_SPREAD = 4
_ADAPTER = "default"


def block_ranks(importances: Sequence[float], rank: int) -> list[int]:
    """Return the rank of each block: even, in proportion, with ``rank`` as mean.

    Args:
        importances: Of each block, relative to one another.
        rank: Even.

    Raises:
        ConfigError: An importance is not a positive number.
    """
    if not all(0 < value < float("inf") for value in importances):
        raise ConfigError(
            f"importances of blocks {list(importances)}; give positive numbers"
        )
    count = len(importances)
    mean = sum(importances) / count
    low, high = max(2, rank // _SPREAD // 2 * 2), rank * _SPREAD
    exact = [min(max(rank * s / mean, low), high) for s in importances]
    ranks = [max(low, 2 * round(value / 2)) for value in exact]
    while (missing := count * rank - sum(ranks)) != 0:
        step = 2 if missing > 0 else -2
        able = [i for i in range(count) if low <= ranks[i] + step <= high]
        chosen = max(able, key=lambda i: (step * (exact[i] - ranks[i]), -i))
        ranks[chosen] += step
    return ranks


def require_peft() -> None:
    """Raise unless peft can be imported.

    Raises:
        MissingDependencyError: It cannot; the message names the extra.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "peft", extra="recover", purpose="recover.options.train: lora"
        ) from error


class LoraWeights(Trained):
    """Adapters of all linear layers of the blocks, and the norms if wanted.

    Args:
        model: Gets the adapters.
        handle: Where weights of norms are read again, in their own type.
        ranks: Of each block.
        plus: Learning rate of B over that of A.
        norms: Train weights of norms as well, at A's rate.
        seed: Of A.
    """

    def __init__(
        self,
        model: WholeModel,
        handle: ModelHandle,
        *,
        ranks: Sequence[int],
        plus: float,
        norms: bool,
        seed: int,
    ) -> None:
        self._layers = _inject_(model, ranks, seed)
        parameters: dict[str, nn.Parameter] = {}
        rates: dict[str, float] = {}
        for name, layer in self._layers.items():
            parameters[f"{name}.lora_A"] = _factor_(layer.lora_A, model)
            parameters[f"{name}.lora_B"] = _factor_(layer.lora_B, model)
            rates[f"{name}.lora_B"] = plus
        self._norms = tuple(norm_weights(model.description)) if norms else ()
        for name in self._norms:
            parameters[name] = promote_(model, handle, name)
        super().__init__(model, parameters, rates)

    @property
    def weights(self) -> frozenset[str]:
        """Names of the checkpoint's tensors that training changes."""
        return frozenset([*(f"{name}.weight" for name in self._layers), *self._norms])

    @torch.no_grad()
    def dense(self, name: str, stored: Tensor) -> Tensor:
        """Return what a tensor of the checkpoint has become, on the CPU."""
        if name in self.parameters:
            return self.parameters[name].detach().cpu().to(stored.dtype)
        layer = self._layers[name.removesuffix(".weight")]
        change: Tensor = layer.get_delta_weight(_ADAPTER).cpu()
        return (stored.float() + change).to(stored.dtype)


def _inject_(model: WholeModel, ranks: Sequence[int], seed: int) -> dict[str, Any]:
    """Wrap all linear layers of the blocks; returns peft's layers by name."""
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    prefix = f"{model.description.family.blocks}."
    names = model.description.linears()
    # Looks back: number 0 is the first block, and not the first expert of any.
    pattern = {rf"(?<![\w.]){index}\..*": rank for index, rank in enumerate(ranks)}
    config = LoraConfig(
        r=max(ranks),
        lora_alpha=ALPHA * max(ranks),
        target_modules=[name.removeprefix(prefix) for name in names],
        rank_pattern=pattern,
        alpha_pattern={key: ALPHA * rank for key, rank in pattern.items()},
    )
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        # Into the blocks alone: for a model that it knows, peft has names of its own.
        inject_adapter_in_model(config, model.blocks, _ADAPTER)
    layers: dict[str, Any] = {n: model.module.get_submodule(n) for n in names}
    for layer in layers.values():  # autocast rounds inputs; peft would widen them
        layer.cast_input_dtype_enabled = False
    return layers


def _factor_(factors: Any, model: WholeModel) -> nn.Parameter:
    """Make one factor of a layer a float32 parameter that is trained."""
    linear = factors[_ADAPTER]
    linear.weight = nn.Parameter(linear.weight.detach().to(model.device, torch.float32))
    parameter: nn.Parameter = linear.weight
    return parameter
