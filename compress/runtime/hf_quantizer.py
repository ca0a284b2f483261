"""transformers opens folders of ``quant_method: palette`` once this is registered.

``import compress`` sees to that (``runtime/hook``). transformers then builds the model
without weights, :class:`PaletteQuantizer` puts coded modules in it, and the library
loads and saves their tensors as it does those of any module. ``model.dequantize()``
decodes once and for all. With ``table_logits`` in the config the head looks logits up
in its tables (``core/table_products``).

Source: ``quantizers/auto.py`` and ``quantizers/base.py`` of transformers 5.23. Limits:
inference only; releases before 5 cast tables to the type that a model is loaded in, of
which a warning is given.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.core import palette_format
from compress.core.errors import CheckpointError
from compress.core.families import family_of
from compress.core.table_products import is_positional
from compress.core.tensors import TORCH_DTYPES
from compress.model.experts import split_experts_
from compress.model.sources import read_header
from compress.runtime.coded_modules import (
    CodedWeight,
    TableHead,
    TiedHead,
    TiedTableHead,
    decode_coded_,
    replace_coded_,
)

_LOG = logging.getLogger(__name__)


class PaletteConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a palette folder.

    Attributes:
        format_version: Of the layout.
        groups: Layers by scheme; see ``core/palette_format``.
        table_logits: Look logits up in tables instead of decoding the head.
    """

    def __init__(
        self,
        format_version: int = palette_format.FORMAT_VERSION,
        groups: list[dict[str, Any]] | None = None,
        table_logits: bool = False,
        **_others: Any,
    ) -> None:
        self.quant_method = palette_format.QUANT_METHOD
        self.format_version = format_version
        self.groups = groups or []
        self.table_logits = table_logits

    def layers(self) -> palette_format.Layers:
        """Return scheme and shape of each coded layer.

        Raises:
            CheckpointError: The entries make no sense.
        """
        return palette_format.layers_of(vars(self))


_TIED = "_tied_before_coding"
_TIED_KEYS = ("_tied_weights_keys", "all_tied_weights_keys")


class PaletteQuantizer(HfQuantizer):  # type: ignore[misc]
    """Gives a model modules that hold codes; what it loads has been coded before."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_others: Any
    ) -> Any:
        """Replace the coded modules; names are those of the checkpoint.

        Raises:
            CheckpointError: Config, files and model do not belong together.
        """
        layers = self.quantization_config.layers()
        _check_files(checkpoint_files or [], layers)
        names = {name for name, _ in model.named_modules()}
        if not set(layers) <= names:
            # transformers stacks experts; coded ones are layers of their own.
            split_experts_(model, family_of(str(model.config.model_type)))
        replace_coded_(model, layers)
        _set_head_(model, table_logits=self.quantization_config.table_logits)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_others: Any) -> Any:
        """Check what was loaded.

        Raises:
            CheckpointError: A tensor is missing or not finite.
        """
        cast = set()
        for name, module in model.named_modules():
            if isinstance(module, CodedWeight):
                module.check(name)
                wanted = TORCH_DTYPES[module.scheme.scale_dtype]
                floats = (t for t in module.stored().values() if t.is_floating_point())
                cast |= {t.dtype for t in floats if t.dtype != wanted}
        if cast:
            _LOG.warning(
                "tables were cast to %s while loading, which changes weights; use "
                "transformers 5 or compress.load",
                ", ".join(sorted(str(dtype) for dtype in cast)),
            )
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        if dtype not in (None, model.dtype):  # casts buffers of the model as well
            model.to(dtype)
        decode_coded_(model)
        _tie_again_(model)
        return model

    def is_serializable(self, *_options: Any, **_others: Any) -> bool:
        """Whether ``save_pretrained`` works: it does, and keeps codes as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether gradients reach the codes: they do not."""
        return False


def register(auto: Any) -> None:
    """Make transformers know the method.

    Args:
        auto: The module ``transformers.quantizers.auto``.
    """
    if palette_format.QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[palette_format.QUANT_METHOD] = (
            PaletteConfig
        )
        auto.AUTO_QUANTIZER_MAPPING[palette_format.QUANT_METHOD] = PaletteQuantizer


def _set_head_(model: Any, *, table_logits: bool) -> None:
    """Let the head of a tied model read a coded embedding, and any head its tables.

    Raises:
        CheckpointError: The config asks for tables that the head does not have.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    coded = embedding if tied else head
    is_coded = isinstance(coded, CodedWeight)
    if table_logits and not (is_coded and is_positional(coded.scheme)):
        raise CheckpointError(
            "config.json asks for table_logits; they take a head, or a tied embedding, "
            f"with a scheme such as pq-4x8, not {coded}; remove the key"
        )
    if head is None or not is_coded or not (tied or table_logits):
        return
    (name,) = (name for name, module in model.named_modules() if module is head)
    if not tied:
        model.set_submodule(name, TableHead(head.original, head.scheme, head.shape))
        return
    kind = TiedTableHead if table_logits else TiedHead
    model.set_submodule(name, kind(head, embedding))
    # Neither module has a weight that could be tied.
    setattr(model, _TIED, {key: getattr(model, key, None) for key in _TIED_KEYS})
    for key in _TIED_KEYS:
        if hasattr(model, key):
            setattr(model, key, {})


def _tie_again_(model: Any) -> None:
    """Tell transformers which weights are shared, once there are weights again."""
    for key, value in getattr(model, _TIED, {}).items():
        if value is not None:
            setattr(model, key, value)


def _check_files(files: list[str], layers: palette_format.Layers) -> None:
    """Compare the headers of the files with the config, before a weight is read.

    transformers would fill what is missing with noise and only log it.
    """
    headers = [(path, read_header(Path(path))) for path in files]
    found = {name: info for _, infos in headers for name, info in infos.items()}
    if not headers:
        return
    folder = Path(headers[0][0]).parent
    for layer, (scheme, shape) in layers.items():
        stored = {
            suffix: found[f"{layer}.{suffix}"]
            for suffix in palette_format.SUFFIXES
            if f"{layer}.{suffix}" in found
        }
        try:
            palette_format.check(stored, scheme, shape)
        except CheckpointError as error:
            raise CheckpointError(
                f"{folder}: {layer}: {error}; the checkpoint is damaged"
            ) from error
