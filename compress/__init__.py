"""Post-training compression of language models: one config in, a smaller model out.

``import compress`` is quick: public names are imported when they are first used. It
makes transformers open folders of our own format too, see ``runtime/hook``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from compress.runtime.hook import install as _install

if TYPE_CHECKING:
    from compress.api import quantize
    from compress.api_prune import prune
    from compress.comparing import compare
    from compress.config import Config
    from compress.core.errors import CompressError
    from compress.kvstudy import kv_study
    from compress.pipeline import evaluate, plan, run
    from compress.result import Result, open_result
    from compress.runtime.accelerate import accelerate
    from compress.runtime.load import load
    from compress.sweeping import sweep

__version__ = "0.1.0"

__all__ = [
    "CompressError",
    "Config",
    "Result",
    "__version__",
    "accelerate",
    "compare",
    "evaluate",
    "kv_study",
    "load",
    "open_result",
    "plan",
    "prune",
    "quantize",
    "run",
    "sweep",
]

_HOME = {
    "CompressError": "compress.core.errors",
    "Config": "compress.config",
    "Result": "compress.result",
    "accelerate": "compress.runtime.accelerate",
    "compare": "compress.comparing",
    "evaluate": "compress.pipeline",
    "kv_study": "compress.kvstudy",
    "load": "compress.runtime.load",
    "open_result": "compress.result",
    "plan": "compress.pipeline",
    "prune": "compress.api_prune",
    "quantize": "compress.api",
    "run": "compress.pipeline",
    "sweep": "compress.sweeping",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})


_install()
