"""Running a model with only one decoder block in memory.

transformers builds the module tree without weights; embedding, blocks and head are
filled from a ``TensorSource`` when their turn comes and emptied afterwards. What a
block needs besides the hidden states (masks, rotary embeddings, per layer type) is
recorded once, by running the model's own ``forward`` with the blocks replaced by
recorders: so every architecture keeps its own rules, and none is copied here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from compress.core.artifact import ModelDescription, TensorSource
from compress.core.errors import CheckpointError
from compress.model.prefetch import ReadAhead
from compress.model.recording import moved, recorded
from compress.model.skeleton import build_skeleton
from compress.model.sources import check_finite, checked
from compress.model.spill import Room, give_back
from compress.model.states import Activations, BlockCall, Mover, allocate, batches
from compress.progress import progress_bar

Rewrite = Callable[[Tensor], Tensor]
"""Returns what stands in for a tensor, of the same shape."""

# Tokens in one forward pass of a block: bounds the size of temporary tensors.
_TOKENS_A_CALL = 4096
_NONE: Mapping[str, Tensor] = {}


class StreamedModel:
    """A causal language model whose weights come and go.

    Args:
        description: The model; its config builds the module tree.
        source: Where weights are read.
        device: Where blocks run.
        dtype: Arithmetic of the blocks, and type of the states between them.
        rounding: By full name of a linear layer, what its inputs are replaced with; how
            a runtime that rounds activations is simulated.
        new_cache: Returns the key-value cache (``transformers.Cache``) that blocks
            store keys and values through; a fresh one for each call of a block.
        room: Where states lie if memory has no room for them.
        prompt: Virtual tokens ``[n, hidden]`` before every window, in the place of what
            the embedding yields. States then have ``n`` more tokens, logits have not.
    """

    def __init__(
        self,
        description: ModelDescription,
        source: TensorSource,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        rounding: Mapping[str, Rewrite] | None = None,
        new_cache: Callable[[], Any] | None = None,
        room: Room | None = None,
        prompt: Tensor | None = None,
    ) -> None:
        self.description = description
        self._room, self._prompt = room, prompt
        self.source = source
        self._rounding = dict(rounding or {})
        self._new_cache = new_cache
        # Heads in use now: models that read one source share them, see with_source.
        self._heads: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
        self._device = torch.device(device)
        self._dtype = dtype
        self._reader = ReadAhead(source, self._device)
        self._mover = Mover(self._device)
        self.model = build_skeleton(description.config)
        family = description.family
        self._blocks = self.model.get_submodule(family.blocks)
        self._body = self.model.get_submodule(family.blocks.rpartition(".")[0])

    @property
    def device(self) -> torch.device:
        """Where blocks run."""
        return self._device

    def with_source(
        self,
        source: TensorSource,
        *,
        rounding: Mapping[str, Rewrite] | None = None,
        new_cache: Callable[[], Any] | None = None,
        prompt: Tensor | None = None,
    ) -> StreamedModel:
        """Return a second model of the same shape that reads other weights.

        ``rounding``, ``new_cache`` and ``prompt`` are not taken over from this one. If
        the source is the same, both have one head in memory while both use it.
        """
        other = StreamedModel(
            self.description,
            source,
            device=str(self._device),
            dtype=self._dtype,
            rounding=rounding,
            new_cache=new_cache,
            room=self._room,
            prompt=prompt,
        )
        if source is self.source:
            other._heads = self._heads
        return other

    def embed(self, windows: Tensor) -> Activations:
        """Return the inputs of block 0 for token windows int64 ``[N, T]``."""
        return self.embed_all([{"input_ids": windows}])[0]

    @torch.no_grad()
    def embed_all(self, batches: Iterable[Mapping[str, Tensor]]) -> list[Activations]:
        """Return the inputs of block 0 for each of several batches of windows.

        Args:
            batches: ``input_ids`` int64 ``[N, T]``, and what else the model is to be
                called with, the same for all ``N``: ``position_ids`` ``[1, T]``, or an
                ``attention_mask`` that is added to scores, ``[1, 1, T, T]``, of dtype.
        """
        family = self.description.family
        with self._loaded(family.embedding), self._loaded(family.final_norm):
            return [self._embedded(**batch) for batch in batches]

    def _embedded(self, input_ids: Tensor, **others: Tensor) -> Activations:
        calls: list[BlockCall] = [{} for _ in self._blocks]
        width = int(self.description.config["hidden_size"])
        count, length = input_ids.shape
        shape = (count, length + self._first, width)
        hidden, pages = allocate(shape, self._dtype, self._device, self._room)
        given = moved(others, self._device)
        with recorded(self._blocks, calls) as first:
            for number, window in enumerate(input_ids):
                self._body(**self._inputs(window), use_cache=False, **given)
                hidden[number] = first.pop()[0]
        give_back(pages)
        return Activations(hidden, calls, pages)

    @property
    def _first(self) -> int:
        """Number of virtual tokens, which come before the first one of a text."""
        return 0 if self._prompt is None else len(self._prompt)

    def _inputs(self, window: Tensor) -> dict[str, Tensor]:
        """Return what the body is called with for a window of ids int64 ``[T]``."""
        ids = window.unsqueeze(0).to(self._device)
        if self._prompt is None:
            return {"input_ids": ids}
        embedding = self.model.get_submodule(self.description.family.embedding)
        text = embedding(ids)
        return {
            "inputs_embeds": torch.cat([self._prompt.to(text).unsqueeze(0), text], 1)
        }

    def copy(self, activations: Activations) -> Activations:
        """Return the same states once more, to go another way."""
        hidden = activations.hidden
        twin, pages = allocate(hidden.shape, hidden.dtype, self._device, self._room)
        for window, values in zip(twin, hidden, strict=True):
            window.copy_(values)
        give_back(pages)
        return Activations(twin, activations.calls, pages)

    def batches(self, activations: Activations) -> list[slice]:
        """Return which windows go through a block together.

        With experts it is all of them: which tokens an expert gets is known for the
        batch that is run, not for the one that is run again.
        """
        if self.description.family.experts is not None:
            return [slice(0, len(activations.hidden))]
        config, device = self.description.config, self._device.type
        return batches(activations.hidden, config, device, self._room)

    def feed(
        self, rows: Sequence[slice], *streams: Activations
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield batches of each of the streams on the device."""
        for batch in self._mover.feed(rows, *(stream.hidden for stream in streams)):
            yield batch
            for stream in streams:
                give_back(stream.pages)

    def store(self, activations: Activations, rows: slice, values: Tensor) -> None:
        """Replace the states of some windows by ``values`` from the device."""
        self._mover.store(activations.hidden, rows, values)
        give_back(activations.pages)

    def advance(
        self, index: int, states: Activations, weights: Mapping[str, Tensor] = _NONE
    ) -> None:
        """Replace states by a loaded block's outputs; weights as in call_block."""
        rows, call = self.batches(states), states.calls[index]
        for part, (hidden,) in zip(rows, self.feed(rows, states), strict=True):
            output = self.call_block(index, hidden, call, weights=weights)
            self.store(states, part, output)

    @torch.no_grad()
    def run_block(
        self,
        index: int,
        activations: Activations,
        *,
        watch: Mapping[str, Callable[[Tensor], None]] | None = None,
    ) -> Tensor:
        """Return the outputs ``[N, T, C]`` of a loaded block for all windows.

        Inputs and cache are rounded if this model rounds them.

        Args:
            index: A block inside :meth:`block`.
            activations: Its inputs.
            watch: For paths of linears inside the block, a function that is handed the
                layer's input ``[B, T, C]`` of each call.
        """
        block = self._blocks[index]
        hooks = [
            block.get_submodule(path).register_forward_pre_hook(
                lambda _module, inputs, handle=handle: handle(inputs[0])
            )
            for path, handle in (watch or {}).items()
        ]
        hooks += self._rounding_hooks(index)  # after the watchers, which see the inputs
        batch = max(1, _TOKENS_A_CALL // activations.hidden.shape[1])
        outputs = []
        try:
            for hidden in torch.split(activations.hidden, batch):
                call = activations.calls[index]
                if self._new_cache is not None:
                    call = {**call, "past_key_values": self._new_cache()}
                outputs.append(self.call_block(index, hidden, call).cpu())
        finally:
            for hook in hooks:
                hook.remove()
        return checked(torch.cat(outputs), self.description.family.block(index))

    def windows(self, activations: Activations, rows: Sequence[int]) -> Tensor:
        """Return the states of some windows on the device."""
        self._mover.wait()
        return activations.hidden[list(rows)].to(self._device)

    def call_block(
        self,
        index: int,
        hidden: Tensor,
        call: BlockCall,
        *,
        weights: Mapping[str, Tensor] = _NONE,
    ) -> Tensor:
        """Return the outputs ``[B, T, C]`` of a loaded block, on its device.

        Gradients flow if ``hidden`` or a weight wants them; neither inputs nor cache
        are rounded.

        Args:
            index: A block inside :meth:`block`.
            hidden: Its inputs.
            call: Its other arguments.
            weights: ``[R, C]`` by path of a linear inside the block, for this call.
        """
        block = self._blocks[index]
        states = hidden.to(self._device, self._dtype)
        others = {
            f"{path}.weight": weight.to(self._device, self._dtype)
            for path, weight in weights.items()
        }
        output = torch.func.functional_call(
            block, others, (states,), moved(call, self._device)
        )
        values: Tensor = output[0] if isinstance(output, tuple) else output
        return values

    def _rounding_hooks(self, index: int) -> list[Any]:
        """Replace the inputs of a block's linears by their rounded values."""
        prefix = f"{self.description.family.block(index)}."
        return [
            self._blocks[index]
            .get_submodule(name.removeprefix(prefix))
            .register_forward_pre_hook(
                lambda _module, inputs, rewrite=rewrite: (
                    rewrite(inputs[0]),
                    *inputs[1:],
                )
            )
            for name, rewrite in self._rounding.items()
            if name.startswith(prefix)
        ]

    @contextmanager
    def block(self, index: int, *, following: int | None = None) -> Iterator[nn.Module]:
        """Fill decoder block ``index`` with weights; empty it on leaving.

        Args:
            index: Number of the block.
            following: The one that comes after it, to be read ahead; ``index + 1`` if
                not given, and none if there is no such block.
        """
        path = self.description.family.block(index)
        after = index + 1 if following is None else following
        with self._loaded(path) as block:
            if 0 <= after < len(self._blocks):
                prefix = self.description.family.block(after)
                names = self._blocks[after].state_dict()
                self._reader.expect(f"{prefix}.{name}" for name in names)
            yield block
            self._mover.wait()

    @contextmanager
    def head(self, *, on_device: bool = False) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield a function from hidden ``[T, C]`` to float32 logits ``[T, V]``.

        Logits come to the CPU, unless they are to stay ``on_device``.
        """
        family = self.description.family
        # A tied head reads the embedding; the module tree still has its own slot.
        path = family.embedding if self.description.tied else family.head
        softcap = self.description.config.get("final_logit_softcapping")
        with self._loaded(family.final_norm) as norm:
            weight = self._heads.get(path)
            if weight is None:
                weight = self._heads[path] = self._tensor(f"{path}.weight")
            bias_name = f"{family.head}.bias"
            has_bias = bias_name in self.source.tensors()
            bias = self._tensor(bias_name) if has_bias else None
            rewrite = self._rounding.get(family.head)

            def logits(hidden: Tensor) -> Tensor:
                with torch.set_grad_enabled(hidden.requires_grad):
                    states = norm(hidden.to(self._device, self._dtype))
                    states = states if rewrite is None else rewrite(states)
                    values = nn.functional.linear(states, weight, bias).float()
                    if softcap:
                        values = torch.tanh(values / softcap) * softcap
                return values if on_device else values.cpu()

            yield logits

    @contextmanager
    def final_norm(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield a function from hidden ``[..., C]`` to the head's input, on device."""
        with self._loaded(self.description.family.final_norm) as norm:
            yield lambda hidden: norm(hidden.to(self._device, self._dtype))

    def logits(self, windows: Tensor, *, name: str = "model") -> Iterator[Tensor]:
        """Yield float32 logits ``[T, V]`` of each token window of int64 ``[N, T]``.

        Blocks are read once for all windows; ``name`` labels the progress bar. Logits
        stay on the device.
        """
        activations = self.embed(windows)
        indices = range(self.description.block_count)
        for index in progress_bar(indices, desc=name, unit="block", leave=False):
            with self.block(index):
                activations.hidden = self.run_block(index, activations)
        with self.head(on_device=True) as head:
            for hidden in activations.hidden:
                yield head(hidden[self._first :])

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
