"""Running a model with only one decoder block in memory.

transformers builds the module tree without weights; embedding, blocks and head are
filled from a ``TensorSource`` when their turn comes and emptied afterwards. What a
block needs besides the hidden states (masks, rotary embeddings, per layer type) is
recorded once, by running the model's own ``forward`` with the blocks replaced by
recorders: so every architecture keeps its own rules, and none is copied here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from compress.core.artifact import ModelDescription, TensorSource
from compress.core.errors import CheckpointError, ConfigError
from compress.core.scales import TORCH_DTYPES
from compress.model.prefetch import ReadAhead
from compress.model.sources import check_finite
from compress.model.states import Activations, BlockCall, Mover, allocate, batches

# Tokens in one forward pass of a block: bounds the size of temporary tensors.
_TOKENS_A_CALL = 4096


class StreamedModel:
    """A causal language model whose weights come and go.

    Args:
        description: The model; its config builds the module tree.
        source: Where weights are read.
        device: Where blocks run.
        dtype: Arithmetic of the blocks, and type of the states between them.
    """

    def __init__(
        self,
        description: ModelDescription,
        source: TensorSource,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.description = description
        self.source = source
        self._device = torch.device(device)
        self._dtype = dtype
        self._reader = ReadAhead(source, self._device)
        self._mover = Mover(self._device)
        self.model = build_skeleton(description.config)
        family = description.family
        self._blocks = self.model.get_submodule(family.blocks)
        self._body = self.model.get_submodule(family.blocks.rpartition(".")[0])

    def with_source(self, source: TensorSource) -> StreamedModel:
        """Return a second model of the same shape that reads other weights."""
        return StreamedModel(
            self.description, source, device=str(self._device), dtype=self._dtype
        )

    @torch.no_grad()
    def embed(self, windows: Tensor) -> Activations:
        """Return the inputs of block 0 for token windows int64 ``[N, T]``."""
        family = self.description.family
        calls: list[BlockCall] = [{} for _ in self._blocks]
        width = int(self.description.config["hidden_size"])
        hidden = allocate((*windows.shape, width), self._dtype, self._device)
        with self._loaded(family.embedding), self._loaded(family.final_norm):
            with _recorded(self._blocks, calls) as first:
                for number, window in enumerate(windows):
                    ids = window.unsqueeze(0).to(self._device)
                    self._body(input_ids=ids, use_cache=False)
                    hidden[number] = first.pop()[0]
        return Activations(hidden, calls)

    def copy(self, activations: Activations) -> Activations:
        """Return the same states once more, to go another way."""
        hidden = activations.hidden
        twin = allocate(hidden.shape, hidden.dtype, self._device).copy_(hidden)
        return Activations(twin, activations.calls)

    def batches(self, activations: Activations) -> list[slice]:
        """Return which windows go through a block together."""
        config, device = self.description.config, self._device.type
        return batches(activations.hidden, config, device)

    def feed(
        self, rows: Sequence[slice], *streams: Activations
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield batches of each of the streams on the device."""
        return self._mover.feed(rows, *(stream.hidden for stream in streams))

    def store(self, activations: Activations, rows: slice, values: Tensor) -> None:
        """Replace the states of some windows by ``values`` from the device."""
        self._mover.store(activations.hidden, rows, values)

    def call_block(self, index: int, hidden: Tensor, call: BlockCall) -> Tensor:
        """Return the outputs ``[B, T, C]`` of a loaded block, on its device."""
        states = hidden.to(self._device, self._dtype)
        output = self._blocks[index](states, **_moved(call, self._device))
        values: Tensor = output[0] if isinstance(output, tuple) else output
        return values

    def advance(self, index: int, activations: Activations) -> None:
        """Replace the states of all windows by the outputs of a loaded block."""
        rows = self.batches(activations)
        batches = self.feed(rows, activations)
        for part, (hidden,) in zip(rows, batches, strict=True):
            output = self.call_block(index, hidden, activations.calls[index])
            self.store(activations, part, output)

    def run_block(self, index: int, activations: Activations) -> Tensor:
        """Return the outputs ``[N, T, C]`` of a loaded block for all windows.

        Args:
            index: A block inside :meth:`block`.
            activations: Its inputs.
        """
        batch = max(1, _TOKENS_A_CALL // activations.hidden.shape[1])
        outputs = [
            self.call_block(index, hidden, activations.calls[index]).cpu()
            for hidden in torch.split(activations.hidden, batch)
        ]
        return torch.cat(outputs)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Fill decoder block ``index`` with weights; empty it on leaving."""
        path = self.description.family.block(index)
        with self._loaded(path) as block:
            if index + 1 < len(self._blocks):
                following = self.description.family.block(index + 1)
                names = self._blocks[index + 1].state_dict()
                self._reader.expect(f"{following}.{name}" for name in names)
            yield block
            self._mover.wait()

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield a function from hidden ``[T, C]`` to float32 logits ``[T, V]``."""
        family = self.description.family
        # A tied head reads the embedding; the module tree still has its own slot.
        path = family.embedding if self.description.tied else family.head
        softcap = self.description.config.get("final_logit_softcapping")
        with self._loaded(family.final_norm) as norm:
            weight = self._tensor(f"{path}.weight")
            bias_name = f"{family.head}.bias"
            has_bias = bias_name in self.source.tensors()
            bias = self._tensor(bias_name) if has_bias else None

            def logits(hidden: Tensor) -> Tensor:
                with torch.no_grad():
                    states = norm(hidden.to(self._device, self._dtype))
                    values = nn.functional.linear(states, weight, bias).float()
                    if softcap:
                        values = torch.tanh(values / softcap) * softcap
                return values.cpu()

            yield logits

    def logits(self, windows: Tensor, *, name: str = "model") -> Iterator[Tensor]:
        """Yield float32 logits ``[T, V]`` of each token window of int64 ``[N, T]``.

        Blocks are read once for all windows; ``name`` labels the progress bar.
        """
        activations = self.embed(windows)
        indices = range(self.description.block_count)
        for index in tqdm(indices, desc=name, unit="block", leave=False, disable=None):
            with self.block(index):
                activations.hidden = self.run_block(index, activations)
        with self.head() as head:
            for hidden in activations.hidden:
                yield head(hidden)

    def _tensor(self, name: str) -> Tensor:
        tensor = self._reader.read(name)
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{name} is stored as {tensor.dtype}; expected a float type. "
                "Quantized checkpoints of other tools have to be dequantized first"
            )
        check_finite(tensor, name)
        return tensor.to(self._dtype)

    @contextmanager
    def _loaded(self, path: str) -> Iterator[nn.Module]:
        module = self.model.get_submodule(path)
        names = list(module.state_dict())
        state = {name: self._tensor(f"{path}.{name}") for name in names}
        for name, tensor in state.items():
            expected = module.get_parameter(name).shape
            if tensor.shape != expected:
                raise CheckpointError(
                    f"{path}.{name} has shape {tuple(tensor.shape)}; the config says "
                    f"{tuple(expected)}"
                )
        module.load_state_dict(state, assign=True)
        buffers = dict(module.named_buffers())  # computed by the model, not stored
        del state
        try:
            yield module
        finally:
            module.to(device="meta")
            for name, buffer in buffers.items():
                owner, _, leaf = name.rpartition(".")
                module.get_submodule(owner)._buffers[leaf] = buffer


def choose_device(wanted: str) -> str:
    """Return the device for ``auto``, or ``wanted`` if it is there.

    Raises:
        ConfigError: There is no CUDA device.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"run.device: {wanted} is not available; use cpu or auto")
    return wanted


def choose_dtype(wanted: str, stored: str, device: str) -> torch.dtype:
    """Return the arithmetic of calibration.

    Args:
        wanted: ``float32``, ``bfloat16``, or ``auto``: bfloat16 where the checkpoint
            has no more than 16 bits and the device multiplies them in hardware.
        stored: Storage type of the checkpoint.
        device: As :func:`choose_device` returned it.
    """
    if wanted != "auto":
        return TORCH_DTYPES[wanted]
    halves = stored in ("float16", "bfloat16") and _multiplies_bfloat16(device)
    return torch.bfloat16 if halves else torch.float32


def _multiplies_bfloat16(device: str) -> bool:
    """Whether a device has fast bfloat16 products; on a CPU, whether it has AMX."""
    if device.startswith("cuda"):
        major, _ = torch.cuda.get_device_capability(device)
        return major >= 8
    if device != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.12
        return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return bool(torch.cpu._is_amx_tile_supported())


def build_skeleton(config: Mapping[str, Any]) -> Any:
    """Return the transformers model of a config, in eval mode, without weights.

    Buffers that the model computes (rotary frequencies, embedding scales) are real.

    Raises:
        CheckpointError: transformers cannot build the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    data = dict(config)
    kind = data.pop("model_type")
    # Flash and SDPA kernels have no soft cap on attention scores (Gemma 2).
    attention = "eager" if data.get("attn_logit_softcapping") else "sdpa"
    try:
        parsed = AutoConfig.for_model(kind, **data)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(
                parsed, attn_implementation=attention, dtype=torch.float32
            )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"transformers cannot build {kind!r}: {error}") from error
    for module in model.modules():
        if any(
            buffer.is_meta for buffer in module._buffers.values() if buffer is not None
        ):
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")
            model._init_weights(module)
    return model.eval().requires_grad_(False)


@contextmanager
def _recorded(blocks: Any, calls: list[BlockCall]) -> Iterator[list[Tensor]]:
    """Replace the blocks' forward by recorders; yield the inputs of block 0."""
    first: list[Tensor] = []

    def recorder(index: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args:
                raise CheckpointError("this architecture calls its blocks by position")
            if not calls[index]:
                calls[index].update(kwargs)
            if index == 0:
                first.append(hidden_states)
            return hidden_states

        return forward

    for index, block in enumerate(blocks):
        block.forward = recorder(index)
    try:
        yield first
    finally:
        for block in blocks:
            del block.forward


def _moved(value: Any, device: torch.device) -> Any:
    """Copy a nest of tensors to ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device) for item in value)
    return value
