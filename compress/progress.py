"""Bars for what takes long, with the time that is left: on a terminal, in a notebook.

Elsewhere nothing is drawn. A notebook's output is no terminal, so that tqdm would be
silent there by itself.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = sys.modules.get("IPython")
    if shell is None:
        return False
    current = shell.get_ipython()
    return current is not None and "IPKernelApp" in getattr(current, "config", {})


def _drawn(kind: Any) -> list[Any]:
    """Return the bars of a kind that are not closed yet."""
    return list(getattr(kind, "_instances", ()))


def progress_bar(*what: Any, **options: Any) -> Any:
    """Return a ``tqdm`` bar that is drawn where somebody can see it.

    Args:
        what: What ``tqdm`` goes over, if anything.
        options: Of ``tqdm``; ``disable=True`` draws nothing anywhere.
    """
    from tqdm import tqdm

    if options.setdefault("disable", None) is None and in_notebook():
        options["disable"] = False
        if find_spec("ipywidgets") is not None:
            from tqdm.notebook import tqdm
        else:
            options["file"] = sys.stdout  # stderr is shown as if it were an error
            # Lines of text cannot be drawn one above the other there.
            options["disable"] = any(not bar.disable for bar in _drawn(tqdm))
    return tqdm(*what, **options)
