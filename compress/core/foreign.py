"""Data from strangers: JSON of any form, and tensors that do not fit together.

What our code stumbles over in a file of somebody else is the file's fault, and is said
so. :data:`MALFORMED` are the errors that taking it apart raises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from compress.core.errors import CheckpointError

MALFORMED = (ValueError, LookupError, TypeError, AttributeError, OverflowError)
"""What taking data apart raises that has another form than it should have."""


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


@contextmanager
def refusing(where: object) -> Iterator[None]:
    """Refuse a checkpoint whose data or tensors have a form that cannot be read.

    Args:
        where: File, folder or layer, for the message.

    Raises:
        CheckpointError: With the cause.
    """
    try:
        yield
    except (*MALFORMED, RuntimeError, re.error) as error:
        raise CheckpointError(
            f"{where}: damaged, or of a form that is not read: "
            f"{type(error).__name__}: {error}"
        ) from error
