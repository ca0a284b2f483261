"""What keeps a broken result from being written as if it were a model.

Quantizing to too few bits, or calibrating on the wrong text, can leave a model that
speaks noise. Its file would load, and nothing would say so. Where perplexity is
measured, a result that is worse than the original by more than a factor is held back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.config.run_section import RunSection


def held_back(metrics: Mapping[str, Any], section: RunSection) -> str | None:
    """Return why a result is not to be exported; ``None`` if nothing speaks against it.

    Args:
        metrics: Figures by text, of ``base`` and ``compressed``; either may be missing.
        section: Has the limit of the ratio of perplexities.
    """
    limit = section.max_perplexity_ratio
    base, compressed = metrics.get("base"), metrics.get("compressed")
    if limit is None or not base or not compressed:
        return None
    for text, figures in compressed.items():
        before, after = base[text]["perplexity"], figures["perplexity"]
        if not after <= limit * before:  # NaN is no number to be proud of either
            return (
                f"nothing was exported: perplexity on {text} is {after:,.5g}, "
                f"{after / before:.3g} times the original's {before:,.5g}, and "
                f"run.max_perplexity_ratio is {limit:g}. Take more bits, another "
                "method or other calibration text; or export it all the same with "
                "--resume --force"
            )
    return None
