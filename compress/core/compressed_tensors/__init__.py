"""compressed-tensors checkpoints: what coded layers are stored as, without I/O.

``schemes`` finds the layout of a scheme and its entry in ``config.json``; ``layout``
and the files beside it say which tensors that means.
"""

from compress.core.compressed_tensors.layout import INPUT_SCALE, SCALE, Layout
from compress.core.compressed_tensors.schemes import (
    MIXED,
    NO_CODES,
    QUANT_METHOD,
    as_read,
    group_entry,
    input_arguments,
    layout_named,
    layout_of,
    obstacle,
    scheme_of_group,
    weight_arguments,
)

SUFFIXES = (
    "weight_packed",
    "weight_scale",
    "weight_global_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
)
"""What a coded layer may store beside, or instead of, ``weight``."""
CACHE_SUFFIXES = ("k_scale", "v_scale")
"""What an attention module stores if the key-value cache is quantized."""

__all__ = [
    "CACHE_SUFFIXES",
    "INPUT_SCALE",
    "MIXED",
    "NO_CODES",
    "QUANT_METHOD",
    "SCALE",
    "SUFFIXES",
    "Layout",
    "as_read",
    "group_entry",
    "input_arguments",
    "layout_named",
    "layout_of",
    "obstacle",
    "scheme_of_group",
    "weight_arguments",
]
