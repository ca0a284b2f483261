"""Logging of the command line: rich on a terminal, plain lines otherwise.

Everything goes to stderr; results go to stdout and are not logged.
"""

from __future__ import annotations

import logging
import os
import sys

_NOISY = ("transformers", "huggingface_hub", "datasets", "accelerate")
_PLAIN = "%(levelname)s %(name)s: %(message)s"


def set_up_logging(*, verbose: bool = False) -> None:
    """Send the toolkit's messages to stderr; ``verbose`` adds debugging ones."""
    handler = _rich_handler() if sys.stderr.isatty() else _plain_handler()
    logger = logging.getLogger("compress")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
    quiet_libraries()


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
