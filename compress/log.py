"""Logging of the command line: rich on a terminal, plain lines otherwise.

Everything goes to stderr; results go to stdout and are not logged.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path

_NOISY = ("transformers", "huggingface_hub", "datasets", "accelerate")
_PLAIN = "%(levelname)s %(name)s: %(message)s"


def is_first() -> bool:
    """Whether this process speaks to the user: the first of those of torchrun."""
    return os.environ.get("RANK", "0") == "0"


def set_up_logging(*, verbose: bool = False) -> None:
    """Send the toolkit's messages to stderr; ``verbose`` adds debugging ones.

    Of the processes that torchrun started, all but the first show errors alone: no
    messages, no progress bars, no results.
    """
    if not is_first():
        sys.stdout = Path(os.devnull).open("w")
        sys.stderr = _Plain(sys.stderr.fileno())
    handler = _rich_handler() if sys.stderr.isatty() else _plain_handler()
    logger = logging.getLogger("compress")
    logger.handlers[:] = [handler]
    level = logging.DEBUG if verbose else logging.INFO
    logger.setLevel(level if is_first() else logging.ERROR)
    logger.propagate = False
    quiet_libraries()


class _Plain(io.TextIOWrapper):
    """A stream that is no terminal, whatever it writes to."""

    def __init__(self, descriptor: int) -> None:
        raw = open(descriptor, "wb", closefd=False)
        super().__init__(raw, line_buffering=True)

    def isatty(self) -> bool:
        return False


def quiet_libraries() -> None:
    """Silence progress bars and chatter of libraries; ours say what matters.

    The variables reach libraries that are imported later, and a user's own setting of
    one wins; the calls reach what is imported already.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    library = sys.modules.get("transformers.utils.logging")
    if library is not None:
        library.disable_progress_bar()


def _plain_handler() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(_PLAIN))
    return handler


def _rich_handler() -> logging.Handler:
    from rich.console import Console
    from rich.logging import RichHandler
    from tqdm import tqdm

    class BesideBars(RichHandler):
        """Writes above running progress bars instead of through them."""

        def emit(self, record: logging.LogRecord) -> None:
            with tqdm.external_write_mode(file=sys.stderr):
                super().emit(record)

    console = Console(stderr=True)
    return BesideBars(console=console, show_path=False, log_time_format="%H:%M:%S")
