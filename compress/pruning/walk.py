"""The last pass of a pruning: statistics, choice and repair of each block.

By ``propagate``, one or two streams of states go from block to block:

* ``dense``: that of the original model; blocks do not see each other's repair.
* ``pruned``: that of the pruned model.
* ``corrected``: both. A block adds the outputs of o and ``down`` to the stream. With
  ``h`` the original's stream behind such an addition, ``h'`` the pruned one before it
  and ``z`` the matrix's inputs in the pruned model, the matrix is the one that
  minimises ``E|h - h' - W' z|^2``: it makes good what went wrong in blocks before. So
  o is fitted too, although it loses nothing.

Every finished block is a shard, which a killed run does not make again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.core.artifact import ModelDescription, TensorSource
from compress.core.errors import CheckpointError
from compress.core.foreign import MALFORMED
from compress.model.states import Activations
from compress.model.streaming import StreamedModel
from compress.progress import progress_bar
from compress.pruning.cutting import Cut, Cutter, Place
from compress.pruning.heads import AttentionPlace, attention_place
from compress.pruning.places import MLPPlace, mlp_places
from compress.pruning.shards import ShardFolder
from compress.pruning.statistics import NeuronMoments, run_through, watched
from compress.workdir import WorkDir

if TYPE_CHECKING:
    from compress.pruning.stage import Pruning

OF_A_BLOCK = ("error", "attention_error", "unseen")
"""What a report says of a block, beside its width."""


class Walk:
    """Cuts block after block, and saves each as a shard.

    Args:
        pruning: What is to be done.
        model: Without the dropped blocks.
        source: Its tensors.
        cutter: Cuts the places of a block.
        places: Where shards are, and where records of them.
    """

    def __init__(
        self,
        pruning: Pruning,
        model: ModelDescription,
        source: TensorSource,
        cutter: Cutter,
        places: tuple[ShardFolder, WorkDir],
    ) -> None:
        self._pruning, self._model, self._source = pruning, model, source
        self._cutter = cutter
        self._folder, self._work = places

    @torch.no_grad()
    def run(self, windows: Tensor | None) -> None:
        """Write the shards that are not there."""
        count = self._model.block_count
        blocks = progress_bar(range(count), desc="pruning", unit="block")
        if not self._pruning.measures_blocks:
            for index in blocks:
                if not self._folder.has_block(index):
                    heads, mlps = self._places(index)
                    self._save(index, self._cutter.cut([*heads, *mlps], {}))
            return
        assert windows is not None
        running = self._pruning.streamed(self._model, self._source)
        states = running.embed(windows)
        original = running.copy(states) if self._pruning.corrects else None
        for index in blocks:
            with running.block(index) as block:
                if original is not None:
                    self._corrected(running, index, block, (states, original))
                elif self._pruning.section.propagate == "dense":
                    self._on_dense(running, index, block, states)
                else:
                    self._on_pruned(running, index, block, states)

    def _places(self, index: int) -> tuple[list[Place], list[Place]]:
        """Return what is cut in a block, in order of execution."""
        pruning = self._pruning
        cuts = pruning.section.kv_groups > 0 or pruning.corrects
        cuts = cuts and self._model.has_attention(index)
        heads: list[Place] = [attention_place(self._model, index)] if cuts else []
        neurons = pruning.target.cuts_neurons
        return heads, [*mlp_places(self._model, index)] if neurons else []

    def _on_dense(
        self, running: StreamedModel, index: int, block: nn.Module, states: Activations
    ) -> None:
        if self._folder.has_block(index):
            running.advance(index, states)
            return
        heads, mlps = self._places(index)
        places = [*heads, *mlps]
        with watched(block, places) as moments:
            running.advance(index, states)
        self._save(index, self._cutter.cut(places, moments))

    def _on_pruned(
        self, running: StreamedModel, index: int, block: nn.Module, states: Activations
    ) -> None:
        heads, mlps = parts = self._places(index)
        if not self._folder.has_block(index):
            cuts: list[Cut] = []
            for part in parts:  # neurons see what is left of the heads
                with watched(block, part) as moments:
                    if part:
                        run_through(running, index, states)
                made = self._cutter.cut(part, moments)
                for cut in made:
                    cut.replace_(block)
                cuts += made
            self._save(index, cuts)
        else:
            for cut in self._saved(index, [*heads, *mlps]):
                cut.replace_(block)
        running.advance(index, states)

    def _corrected(
        self,
        running: StreamedModel,
        index: int,
        block: nn.Module,
        streams: tuple[Activations, Activations],
    ) -> None:
        """Fit o, then ``down`` on what is left of it; the block stays the original."""
        heads, mlps = self._places(index)
        states, original = streams
        weights: dict[str, Tensor] = {}

        def put(cut: Cut) -> None:
            path = cut.place.down_path
            weights[path] = cut.filled(
                block.get_submodule(path).get_parameter("weight")
            )

        has_block = self._folder.has_block(index)
        if has_block:
            for cut in self._saved(index, [*heads, *mlps]):
                put(cut)
        else:
            cuts: list[Cut] = []
            for place in (*heads, *mlps):
                moments = self._missing(running, block, place, streams, weights)
                made = self._cutter.cut([place], {place.path: moments})
                put(made[0])
                cuts += made
            self._save(index, cuts)
        if has_block or not mlps:
            running.advance(index, original)
        running.advance(index, states, weights)

    def _missing(
        self,
        running: StreamedModel,
        block: nn.Module,
        place: Place,
        streams: tuple[Activations, Activations],
        weights: Mapping[str, Tensor],
    ) -> NeuronMoments:
        """Return what a matrix sees in the pruned model, and what is to come of it.

        An MLP is the last of a block: with it the original's stream moves on.
        """
        index, found = place.block, NeuronMoments()
        is_attention = isinstance(place, AttentionPlace)
        layer: Any = block.get_submodule(place.down_path)
        norm = block.get_submodule(self._model.family.mlp_norm)
        bias = 0.0 if layer.bias is None else layer.bias.float()
        states, original = streams
        rows, call = running.batches(states), states.calls[index]
        batches = running.feed(rows, states, original)
        for part, (own, dense) in zip(rows, batches, strict=True):
            with input_of(norm) as between:
                behind = running.call_block(index, dense, call)
            if is_attention:
                behind = between[0]
            else:
                running.store(original, part, behind)
            with input_of(norm) as between, input_of(layer) as inputs:
                running.call_block(index, own, call, weights=weights)
            before = own if is_attention else between[0]
            found.add(inputs[0], behind.float() - before.to(behind).float() - bias)
        return found

    def _saved(self, index: int, places: Sequence[Place]) -> list[Cut]:
        """Return what was cut in a block whose shard is there."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._folder.path(index)
        try:
            kept = self._work.finished(block_stage(index))["kept"]
            stored = load_file(path)
            return [Cut(p, torch.tensor(kept[p.path]), stored) for p in places]
        except (OSError, SafetensorError, *MALFORMED) as error:
            raise CheckpointError(
                f"{path} is damaged ({type(error).__name__}: {error}); delete it and "
                "run again with --resume"
            ) from error

    def _save(self, index: int, cuts: Sequence[Cut]) -> None:
        tensors: dict[str, Tensor] = {}
        for cut in cuts:
            tensors |= cut.tensors
        prefix = f"{self._model.family.block(index)}."
        for name in self._model.tensors:
            if name.startswith(prefix) and name not in tensors:
                tensors[name] = self._source.read(name)
        errors: dict[str, float | None] = {}
        for key, kind in (("error", MLPPlace), ("attention_error", AttentionPlace)):
            of = [c.error for c in cuts if isinstance(c.place, kind)]
            known = [error for error in of if error is not None]
            errors[key] = sum(known) / len(known) if known else None
        record = {
            "kept": {cut.place.path: cut.kept.tolist() for cut in cuts},
            **errors,
            "unseen": sum(cut.unseen for cut in cuts),
        }
        self._work.write_json(f"results/{block_stage(index)}.json", record)
        self._folder.save_block(index, tensors)  # last: it says that the block is done


def block_stage(index: int) -> str:
    """Return the stage that holds what became of a block."""
    return f"block-{index:04d}"


@contextmanager
def input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that gets the module's input at each call for a while."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.append(inputs[0])

    hook = module.register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        hook.remove()
