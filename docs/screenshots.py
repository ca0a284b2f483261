"""Takes the pictures of a report that the documents show, in a headless Chromium.

    python docs/screenshots.py WORKDIR

``WORKDIR`` is that of a run. Writes ``report_wide.png`` (a window of 1280 pixels) and
``report_phone.png`` (390 pixels), each the upper part of the page, beside this file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from browser import Browser, find_browser  # noqa: E402

PICTURES = {"report_wide.png": (1280, 800), "report_phone.png": (390, 1500)}
MOST_BYTES = 150_000


def main() -> None:
    """Write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    page = parser.parse_args().workdir / "report.html"
    path = find_browser()
    if path is None:
        sys.exit("there is no Chromium on this machine; install one (Debian: chromium)")
    with Browser(path) as browser:
        for name, (width, height) in PICTURES.items():
            browser.resize(width, height)
            browser.open(page)
            picture = browser.picture()
            (HERE / name).write_bytes(picture)
            size = f"{len(picture):,} bytes"
            print(HERE / name, size, "" if len(picture) <= MOST_BYTES else "TOO LARGE")
        if browser.problems:
            sys.exit("\n".join(browser.problems))


if __name__ == "__main__":
    main()
