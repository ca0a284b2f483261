"""ZeroQuant-FP: float weights under scales that a bit shift can apply.

Weights are small floats (E2M1, E4M3), rounded with error feedback. Scales are powers of
two (M1, schemes that end in ``-pow2``), or a real scale for each row over powers of two
(M2, ``-ratio``), so that FP4 becomes FP8 by adding to the exponent; M2 needs one
multiplication a row at the end. A low-rank correction (LoRC, ``-lorcR``) repairs what
is left. With inputs in FP8 these are the schemes ``w4a8-fp-...``.

The paper rounds exponents up, ``S' = 2^ceil(log2 S)``, and for M2 the shift,
``S' = S_max / 2^ceil(log2(S_max / S))``, which makes scales smaller and clips the
largest weight. Here both are choices of ``scale_rounding``; the default, ``mse``, tries
the exponents around the nearest and keeps the one of least error, weighted by the
second moment of the inputs, and for M2 eight row scales within an octave. On
Student-t(5) weights in groups of 32 that takes the relative error of M1 from .132
(``ceil``) to .122, of M2 from .213 to .119; free scales give .093 when searched.

Source: Wu et al. (2023), "ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8
Quantization Using Floating-Point Formats", arXiv 2307.09782; LoRC from Yao et al.
(2023), "ZeroQuant-V2", arXiv 2303.08302. Error feedback is that of ``gptq`` with its
options, so that it differs from the paper as ``gptq`` does.

Limits: in groups of 16 scales that are powers of two cost a quarter of the error and
more; the paper uses groups of 256.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from compress.core import grids
from compress.core.contracts import Options
from compress.core.scheme import Scales, Scheme
from compress.quantizers.gptq import GPTQ, GPTQOptions

_OF_EXPONENTS = (Scales.POWER, Scales.RATIO)


class ZeroQuantFPOptions(GPTQOptions):
    """Options of ``zeroquant_fp``: those of ``gptq``, and one more.

    Attributes:
        scale_rounding: How scales of ``-pow2`` and ``-ratio`` schemes become powers of
            two: by least error (``mse``), or to the ``nearest`` exponent, or as in the
            paper (``ceil``), or the other way (``floor``). ``search`` decides about all
            other scales.
    """

    scale_rounding: Literal["mse", "nearest", "ceil", "floor"] = "mse"


class ZeroQuantFP(GPTQ):
    """Error feedback under scales that are powers of two, or ratios of them."""

    name = "zeroquant_fp"
    summary = "FP4 and FP8 weights, power-of-two scales, error feedback"
    source = "Wu et al. 2023 (arXiv 2307.09782); Yao et al. 2023 (arXiv 2303.08302)"
    Options: ClassVar[type[Options]] = ZeroQuantFPOptions
    options: ZeroQuantFPOptions

    def schemes(self) -> tuple[str, ...]:
        """Names of schemes an allocator may choose, most bits first."""
        return ("fp8", "fp6-g64", "fp4-g64-ratio", "fp4-g128-ratio")

    def parameters(
        self, target: Tensor, scheme: Scheme, importance: Tensor
    ) -> grids.GridParameters:
        """Return the scales and zero points of ``target`` ``[R, C]``."""
        rounding = self.options.scale_rounding
        if scheme.scales not in _OF_EXPONENTS or rounding == "mse":
            return super().parameters(target, scheme, importance)
        groups = grids.as_groups(target, scheme)
        return grids.range_parameters(groups, scheme, rounding=rounding)
