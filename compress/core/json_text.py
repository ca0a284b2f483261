"""JSON from strangers."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Return the data of a JSON text, whatever it is.

    Raises:
        json.JSONDecodeError: The text is no JSON, or lists and objects are nested so
            deeply that Python's own parser gives up (with a ``RecursionError``, which
            is no ``ValueError``).
        UnicodeDecodeError: Bytes that are no UTF-8, which is a ``ValueError`` as well.
    """
    try:
        return json.loads(text)
    except RecursionError:
        shown = text if isinstance(text, str) else text.decode("utf-8", "replace")
        raise json.JSONDecodeError("nested too deeply", shown, 0) from None


MALFORMED = (ValueError, LookupError, TypeError, AttributeError, OverflowError)
"""What taking data apart raises that has another form than it should have."""
