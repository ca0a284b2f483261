"""A whole model in memory, whose layers can be given other weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.core.artifact import ModelDescription, TensorSource
from compress.model.streaming import StreamedModel


class ResidentModel(StreamedModel):
    """A :class:`StreamedModel` that reads each weight once and keeps it.

    :meth:`refresh` reads weights again that have changed in the source, which answers
    for them.
    """

    def __init__(
        self,
        description: ModelDescription,
        source: TensorSource,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(description, source, device=device, dtype=dtype)
        self._filled: dict[str, nn.Module] = {}
        self._kept: dict[str, Tensor] = {}

    def refresh(self, layers: Iterable[str]) -> None:
        """Read the weights of modules again, by full name."""
        for layer in layers:
            name = f"{layer}.weight"
            if name in self._kept or any(
                layer == path or layer.startswith(f"{path}.") for path in self._filled
            ):
                values = self.source.read(name).to(self._device, self._dtype)
                if name in self._kept:
                    self._kept[name] = values
                    self._heads.pop(layer, None)
                parameter = self.model.get_submodule(layer).get_parameter("weight")
                if not parameter.is_meta:
                    parameter.data = values

    @contextmanager
    def block(self, index: int, *, following: int | None = None) -> Iterator[nn.Module]:
        """Yield decoder block ``index``, which stays filled."""
        with self._loaded(self.description.family.block(index)) as block:
            yield block
            self._mover.wait()

    def _tensor(self, name: str) -> Tensor:
        family = self.description.family
        if name not in (f"{family.embedding}.weight", f"{family.head}.weight"):
            return super()._tensor(name)
        if name not in self._kept:  # what the head reads, too
            self._kept[name] = super()._tensor(name)
        return self._kept[name]

    @contextmanager
    def _loaded(self, path: str) -> Iterator[nn.Module]:
        module = self.model.get_submodule(path)
        if path not in self._filled:
            names = list(module.state_dict())
            state = {name: self._tensor(f"{path}.{name}") for name in names}
            module.load_state_dict(state, assign=True)
            module.requires_grad_(False)
            self._filled[path] = module
        yield module
