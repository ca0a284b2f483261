"""Teaches transformers our formats when, and only when, it is imported.

transformers finds quantization methods in a table of its own; it has no entry points.
So ``import compress`` leaves a note with the import system: once
``transformers.quantizers.auto`` has been imported, by whomever, our method is entered
there. Until then neither torch nor transformers is imported, and the note is removed
when it has served. Nothing of transformers is changed but that table.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TARGET = "transformers.quantizers.auto"


class _AfterImport:
    """A finder that lets the others find the module, and registers afterwards."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)  # type: ignore[assignment]
        return spec


class _Registering:
    """A loader that registers our method once the module has run."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register(module)


def install() -> None:
    """Register our method with transformers, now or when it is imported."""
    module = sys.modules.get(_TARGET)
    if module is not None:
        _register(module)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register(module: ModuleType) -> None:
    try:
        from compress.runtime.hf_quantizer import register

        register(module)
    except (ImportError, AttributeError) as error:
        # Another release of transformers: the import of it must not fail for this.
        warnings.warn(
            f"transformers will not open palette folders: {error}; use compress.load",
            stacklevel=2,
        )
