"""Messages go to stderr, above progress bars on a terminal, plain in a file."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator

import pytest
from tqdm import tqdm

from compress.log import quiet_libraries, set_up_logging


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    logger = logging.getLogger("compress")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    logging.getLogger("compress.demo").info("three of 4 layers")
    logging.getLogger("compress.demo").debug("unseen")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "INFO compress.demo: three of 4 layers\n"


def test_verbose_adds_debugging(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(verbose=True)
    logging.getLogger("compress.demo").debug("seen")
    assert "seen" in capsys.readouterr().err


def test_terminal_lines_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    set_up_logging()
    with tqdm(total=2, file=terminal, desc="blocks", mininterval=0) as bar:
        bar.update()
        logging.getLogger("compress.demo").warning("damping was raised")
    line = next(x for x in terminal.getvalue().splitlines() if "damping" in x)
    # The bar is wiped from its line before the message is written.
    assert "blocks" not in line.rpartition("\r")[2]


def test_setting_up_twice_does_not_double_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_up_logging()
    set_up_logging()
    logging.getLogger("compress.demo").info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_libraries_are_quiet_but_a_users_setting_wins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    quiet_libraries()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    assert logging.getLogger("datasets").level == logging.ERROR
