"""Files that are missing, cut short or damaged: found, never mended."""

from __future__ import annotations

from pathlib import Path

from compress.core.errors import CheckpointError
from compress.doctor.faults import Fault
from compress.model.quantized_config import folder_config
from compress.model.sources import read_header, weight_files

KIND = "damage"


def find(folder: Path) -> list[Fault]:
    """Return a fault for each file that cannot be read."""
    try:
        folder_config(folder)
        files = weight_files(folder)
    except CheckpointError as error:
        return [Fault(KIND, folder.name, str(error), mendable=False)]
    found = []
    for file in files:
        try:
            read_header(file)
        except CheckpointError as error:
            found.append(Fault(KIND, file.name, str(error), mendable=False))
    return found
