"""One block over all calibration windows, input by input, in bounded memory.

Each layer is to see what the compressed layers before it feed it ("true sequential"
order). Where all windows fit into one batch, a single pass does it: when the first
layer that reads an input is about to run, the pass stops, statistics are complete,
the layers are quantized there and then, and the pass goes on with their new weights.

With more batches, the first one is run in the same way. Where it stops, every other
batch is run from the block's start to that very input and no further, by the weights
that are there by then, and its moments are added. Nothing but states between blocks and
one batch inside of it is ever held. That costs 2.4 passes instead of one for a block
with the shape of Llama 2.

The dense model, where drift is wanted, walks beside: the same batch, the same input, by
the weights that the block came with.

Experts of one block do not feed each other, so several of them are settled at a time:
as many as there are processes, and as many more as their second moments leave room for,
since small matrices are coded side by side in about the time of one. Which tokens they
get is known when the first of them is reached; what the others will read is then
computed ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from torch import Tensor, nn

from compress.calibration import experts
from compress.calibration.collect import Moments
from compress.calibration.experts import DenseExperts
from compress.core.families import Linear
from compress.model.states import Activations
from compress.model.streaming import StreamedModel

# Second moments of experts that are settled together, and what solving with them takes:
# float64 sums first, then H, what that is damped to, its factor, the drift.
_EXPERT_BYTES = {"cuda": 1 << 31}
_EXPERT_BYTES_ELSEWHERE = 1 << 28
_BYTES_OF_A_MOMENT = 16

Measure = Callable[[], Moments]
"""Sums up one input over all windows; to be called once."""
Settle = Callable[[Mapping[str, Measure]], None]
"""Told inputs that do not depend on each other, before any layer reads them."""


class _Reached(Exception):
    """A batch has reached the input that it was run for."""


class InputWatch:
    """Hooks on the linears of a block that show their inputs, once for each shared one.

    Args:
        block: The module.
        linears: Those of its layers that matter.
    """

    def __init__(self, block: nn.Module, linears: Sequence[Linear]) -> None:
        self._handle: Callable[[str, Tensor], None] | None = None
        self._hooks = [
            block.get_submodule(linear.path).register_forward_pre_hook(
                lambda _module, inputs, name=linear.input: self._show(name, inputs[0])
            )
            for linear in linears
        ]

    def _show(self, name: str, inputs: Tensor) -> None:
        if self._handle is not None:
            self._handle(name, inputs)

    @contextmanager
    def _handled(self, handle: Callable[[str, Tensor], None]) -> Iterator[None]:
        before, self._handle = self._handle, handle
        try:
            yield
        finally:
            self._handle = before

    def run(
        self, forward: Callable[[], Tensor], meet: Callable[[str, Tensor], None]
    ) -> Tensor:
        """Return what ``forward`` does; tell ``meet`` each input when it is first read.

        ``meet`` may use this watch for other runs of the block.
        """
        seen: set[str] = set()

        def first(name: str, inputs: Tensor) -> None:
            if name not in seen:
                seen.add(name)
                meet(name, inputs)

        with self._handled(first):
            return forward()

    def until(self, name: str, forward: Callable[[], Tensor]) -> Tensor:
        """Return the input of that name; ``forward`` is left where it is first read."""
        found: list[Tensor] = []

        def stop(other: str, inputs: Tensor) -> None:
            if other == name:
                found.append(inputs)
                raise _Reached

        with self._handled(stop), suppress(_Reached):
            forward()
        return found[0]

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


class BlockWalk:
    """A loaded block and the states that go through it.

    Args:
        model: Has the block loaded.
        index: Which block.
        block: Its module.
        states: Of the compressed model; replaced by the block's outputs.
        dense: Of the dense model, likewise, if it runs beside.
        together: The least number of experts that are settled at a time.
    """

    def __init__(
        self,
        model: StreamedModel,
        index: int,
        block: nn.Module,
        states: Activations,
        dense: Activations | None = None,
        *,
        together: int = 1,
    ) -> None:
        self._together = together
        self._model, self._index, self._block = model, index, block
        self._states, self._dense = states, dense
        self._streams = [states] if dense is None else [states, dense]
        self._first, *self._rest = model.batches(states)
        self._original: dict[str, Tensor] = {}
        self._names = model.description.family.experts

    def weight(self, path: str) -> Tensor:
        """Return the present weights ``[R, C]`` of a linear."""
        return self._block.get_submodule(path).get_parameter("weight").data

    def replace(self, path: str, values: Tensor) -> None:
        """Give a linear of the block new weights ``[R, C]``."""
        weight = self._block.get_submodule(path).get_parameter("weight")
        if self._dense is not None and self._rest:
            self._original.setdefault(path, weight.data)
        weight.data = values.to(weight)

    def run(self, linears: Sequence[Linear], settle: Settle) -> None:
        """Send all states through the block, settling its layers on the way.

        Args:
            linears: Layers to be settled, in order of execution.
            settle: Told each of their inputs once; may :meth:`replace` the weights of
                the layers that read them.
        """
        states, dense = self._states, self._dense
        watch = InputWatch(self._block, linears)
        readers = {linear.input: linear for linear in reversed(linears)}
        kept: dict[str, Tensor] = {}
        routed: list[Tensor] = []
        dense_experts: DenseExperts | None = None
        settled: set[str] = set()

        def measure(name: str, inputs: Tensor | None) -> Moments:
            before = kept.pop(name, None)
            if dense_experts is not None and readers[name].expert is not None:
                before = dense_experts.inputs(readers[name])
            if inputs is None:
                inputs = experts.inputs_of(self._block, self._names, readers[name])
            moments, sizes = Moments(), None
            if readers[name].expert is not None:
                length = self._states.hidden.shape[1]
                sizes = experts.window_sizes(
                    self._block, self._names, readers[name], length
                )
            moments.add(inputs, before, sizes=sizes)
            for batch in self._model.feed(self._rest, *self._streams):
                moments.add(*self._inputs(watch, name, batch))
            return moments

        def meet(name: str, inputs: Tensor) -> None:
            if name in settled:
                return
            wave = experts.alike(readers, name, settled)
            wave = wave[: self._experts_at_once(readers[name])]
            settled.update(wave)
            settle(
                {
                    member: partial(measure, member, inputs if member == name else None)
                    for member in wave
                }
            )

        try:
            if dense is not None:
                (hidden,) = next(self._model.feed([self._first], dense))
                with self._kept_states(linears, routed):
                    output = watch.run(lambda: self._forward(hidden), kept.__setitem__)
                self._model.store(dense, self._first, output)
                dense_experts = experts.dense_experts(self._block, self._names, routed)
            (inputs,) = next(self._model.feed([self._first], states))
            output = watch.run(lambda: self._forward(inputs), meet)
            self._model.store(states, self._first, output)
        finally:
            watch.close()
        self._finish()

    def run_at_once(self, linears: Sequence[Linear], settle: Settle) -> None:
        """Send all states through the block, settling its layers together.

        All inputs are measured while the block has the weights that it came with, in
        one pass, with the moments of all of them in memory; a second pass makes the
        outputs. Not for experts, whose moments would be too many.

        Args:
            linears: Layers to be settled.
            settle: Told all of their inputs, once; may :meth:`replace` their weights.
        """
        sums = {linear.input: Moments() for linear in linears}
        watch = InputWatch(self._block, linears)
        rows = [self._first, *self._rest]
        try:
            batches = self._model.feed(rows, *self._streams)
            for part, batch in zip(rows, batches, strict=True):
                seen: list[dict[str, Tensor]] = []
                for hidden in batch:
                    seen.append({})
                    forward = partial(self._forward, hidden)
                    output = watch.run(forward, seen[-1].__setitem__)
                if self._dense is not None:
                    self._model.store(self._dense, part, output)
                for name, moments in sums.items():
                    moments.add(*(inputs.pop(name) for inputs in seen))
        finally:
            watch.close()
        settle({name: partial(sums.__getitem__, name) for name in sums})
        self._model.advance(self._index, self._states)
        self._original.clear()

    def _experts_at_once(self, linear: Linear) -> int:
        """Return how many experts are settled together with one like this."""
        weight = self.weight(linear.path)
        most = _EXPERT_BYTES.get(weight.device.type, _EXPERT_BYTES_ELSEWHERE)
        return max(self._together, most // (_BYTES_OF_A_MOMENT * weight.shape[1] ** 2))

    @contextmanager
    def _kept_states(
        self, linears: Sequence[Linear], kept: list[Tensor]
    ) -> Iterator[None]:
        """Keep what the block hands to its experts, if it has any, for a while."""
        hooks = [
            self._block.get_submodule(path).register_forward_pre_hook(
                lambda _module, inputs, keep=keep: keep(inputs[0])
            )
            for path, keep in experts.keep_states(linears, self._names, kept).items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _inputs(
        self, watch: InputWatch, name: str, batch: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """Yield one input of one batch: of the compressed, then of the dense model."""
        yield watch.until(name, lambda: self._forward(batch[0]))
        if self._dense is not None:
            with self._dense_weights():
                yield watch.until(name, lambda: self._forward(batch[1]))

    def pass_on(self, values: Mapping[str, Tensor]) -> None:
        """Send all states through the block.

        Args:
            values: New weights by path, for the compressed model.
        """
        if self._dense is not None:
            self._model.advance(self._index, self._dense)
        for path, weight in values.items():
            self.replace(path, weight)
        self._model.advance(self._index, self._states)

    def _finish(self) -> None:
        """Send what is left through the finished block."""
        batches = self._model.feed(self._rest, *self._streams)
        for rows, batch in zip(self._rest, batches, strict=True):
            self._model.store(self._states, rows, self._forward(batch[0]))
            if self._dense is not None:
                with self._dense_weights():
                    output = self._forward(batch[1])
                self._model.store(self._dense, rows, output)
        self._original.clear()

    def _forward(self, hidden: Tensor) -> Tensor:
        return self._model.call_block(
            self._index, hidden, self._states.calls[self._index]
        )

    @contextmanager
    def _dense_weights(self) -> Iterator[None]:
        """Put the weights back that were replaced, for a while."""
        weights = {
            path: self._block.get_submodule(path).get_parameter("weight")
            for path in self._original
        }
        present = {path: weight.data for path, weight in weights.items()}
        for path, weight in weights.items():
            weight.data = self._original[path]
        try:
            yield
        finally:
            for path, weight in weights.items():
                weight.data = present[path]
