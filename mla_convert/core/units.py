"""Numbers of tokens, lengths of windows, bytes and durations, as typed and as printed. Imports no torch."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator

SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}
SHORTEST = 16


def parse_tokens(value: Any) -> Any:
    """`200k`, `20M` or `1.5B` as a number of tokens; a value that is not a string is returned unchanged.

    Raises:
        ValueError: The text is no number of tokens.
    """
    if not isinstance(value, str):
        return value
    unit = UNITS.get(value[-1:].lower())
    try:
        tokens = float(value[:-1] if unit else value) * (unit or 1.0)
    except ValueError:
        # NaN fails the comparison below, as do the NaN and the infinity that `float` itself reads.
        tokens = math.nan
    if not 1 <= tokens < 1e15:
        raise ValueError(f"{value!r} is no number of tokens: give 200k, 20M or 1.5B, say")
    return round(tokens)


def parse_lengths(value: Any) -> tuple[tuple[int, float], ...]:
    """`1024`, or `1024:0.75,4096:0.25`, as window lengths with their fractions of the tokens, which sum to 1.

    Raises:
        ValueError: The text is neither.
    """
    weights: dict[int, float] = {}
    for part in str(value).split(","):
        length, _, share = part.partition(":")
        try:
            size, weight = int(length), float(share) if share else 1.0
        except ValueError:
            raise ValueError(f"{value!r} is neither a length nor lengths with shares (1024:0.75,4096:0.25)") from None
        if size < SHORTEST or not 0 < weight < math.inf or size in weights:
            raise ValueError(f"{part!r} is no further length of at least {SHORTEST} tokens with a share above 0")
        weights[size] = weight
    total = sum(weights.values())
    return tuple((length, weight / total) for length, weight in weights.items())


def _lengths(value: Any) -> str:
    parse_lengths(value)
    return str(value)


def parse_duration(value: Any) -> Any:
    """`90s`, `10min` or `1.5h` in seconds; a value that is not a string is returned unchanged.

    Raises:
        ValueError: The text is no duration.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", value.strip())
    if not match or not float(match[1]):
        raise ValueError(f"{value!r} is no duration: give 90s, 10min or 1.5h, say")
    return float(match[1]) * SECONDS[match[2]]


Duration = Annotated[float, BeforeValidator(parse_duration)]
Tokens = Annotated[int, BeforeValidator(parse_tokens)]
Lengths = Annotated[str, BeforeValidator(_lengths)]


def human_bytes(number: float) -> str:
    """1234567 -> '1.2 MB' (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    raise AssertionError


def human_tokens(tokens: float) -> str:
    """1234567 -> '1.23M' (powers of ten, three digits)."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.0f}"


def duration(seconds: float) -> str:
    """93.4 -> '1.6 min', to two digits: estimates are no more accurate."""
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        # Below one and a half of a unit the next smaller one shows two digits without a decimal.
        if seconds >= 1.5 * size:
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 9.5 else f"{value:.1f} {unit}"
    return f"{max(seconds, 1):.0f} s"
