"""Values as tables, cards and pages print them. A value that is not finite has a sign or words of its own. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mla_convert.core.report_schema import CalibrationSection, Comparison, JsonObject, LayerEntry, Mean

NOTHING = "–"
NOT_FINITE = "not finite"


def number(value: float | None, digits: int, missing: str = NOTHING) -> str:
    """A number with `digits` decimals; `missing` if it is None or not finite."""
    return missing if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def with_error(mean: Mean | None, digits: int, missing: str = NOTHING) -> str:
    """A mean with its standard error: 0.1234 ± 0.0012."""
    return missing if mean is None else spread(mean.value, mean.error, digits, missing)


def spread(value: float, error: float, digits: int, missing: str = NOTHING) -> str:
    """A value with its standard error, where that is finite."""
    text = number(value, digits, missing)
    return text if text == missing or not math.isfinite(error) else f"{text} ± {error:.{digits}f}"


def times(value: float | None, digits: int, missing: str = NOT_FINITE) -> str:
    """A ratio: ×1.0110."""
    text = number(value, digits, "")
    return f"×{text}" if text else missing


def ratio(comparison: Comparison) -> str:
    """A perplexity ratio with its standard error over windows: ×1.0110 ± 0.0012."""
    text, error = times(comparison.ratio, 4), comparison.ratio_error
    return f"{text} ± {error:.4f}" if math.isfinite(error) and error else text


def perplexity(value: float | None) -> str:
    """A perplexity in a table of many: without decimals from 1000 on."""
    return number(value, 3 if value is None or value < 1000 else 0)


def percent(value: float | None, digits: int = 1) -> str:
    """A share: 12.3%."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.{digits}%}"


def scientific(value: float | None) -> str:
    """A small error: 1.23e-04."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.2e}"


def elapsed(seconds: float) -> str:
    """A measured time: 93.4 is 1 min 33 s; `units.duration` is for estimates."""
    # Rounded before it is compared, or 59.6 would print as 60 s.
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def context(tokens: str | int) -> str:
    """A length of text: 32768 is 32k."""
    return f"{int(tokens) // 1024}k"


def calibration_text(calibration: CalibrationSection) -> str:
    """The calibration windows in words."""
    share = calibration.self_written
    return calibration.protocol + (f", {share:.0%} of them written by the original itself" if share else "")


def latent_words(latent_cache: JsonObject | None) -> str:
    """The format of a quantised cache behind its sizes: " in int4"; nothing for a cache of numbers."""
    if not latent_cache:
        return ""
    kind = latent_cache.get("kind")
    return " in int8 and int4" if kind == "mixed" else f" in {kind}"


def content_words(layers: Sequence[LayerEntry]) -> str:
    """The content dims of narrower heads and their cost: "heads of 64 content dims, which keep …"; nothing for whole heads."""
    kept = [layer.energy.nope_kept for layer in layers if layer.energy and math.isfinite(layer.energy.nope_kept)]
    if not kept:
        return ""
    dims = min(layer.qk_nope_head_dim or 0 for layer in layers)
    return f"heads of {dims} content dims, which keep {percent(min(kept), 3)} of the content logits' energy or more"
