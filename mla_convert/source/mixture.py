"""Calibration on several texts: which, and how much of each. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from mla_convert.core.errors import InputError

# What is calibrated on where nothing is named: packaged, so that it needs no network and is the same everywhere. A latent has
# room for what calibration looks at and for little else, so it is of many kinds. Nothing of it is in the packaged suite.
PACKAGED = (
    "package:mla_demo/calibration.txt.gz",
    "package:mla_texts/calibration/documentation.txt.gz",
    "package:mla_texts/calibration/python.txt.gz",
    "package:mla_texts/calibration/code.txt.gz",
    "package:mla_texts/calibration/mathematics.txt.gz",
    "package:mla_texts/calibration/languages.txt.gz",
)
PACKAGED_LABEL = "the texts packaged with mla_convert"


@dataclass(frozen=True)
class Part:
    """A text, named as `texts.load_text` takes it, and its weight among others."""

    spec: str
    weight: float = 1.0

    def __str__(self) -> str:
        return self.spec if self.weight == 1 else f"{self.spec}={self.weight:g}"


def parts(given: str | list[str] | None) -> list[Part]:
    """What to calibrate on: the texts that are given, each with `=WEIGHT` behind it or none (1), or else the packaged ones.

    Raises:
        InputError: a weight that is none, or a text that is given twice.
    """
    found = [_part(spec) for spec in ([given] if isinstance(given, str) else given or PACKAGED)]
    names = [part.spec for part in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"calibration text {name} is given twice: give it once, with a weight ({name}=2)")
    return found


def _part(spec: str) -> Part:
    name, _, tail = spec.rpartition("=")
    if not name or Path(spec).expanduser().exists():  # a file's name may hold an equals sign
        return Part(spec)
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise InputError(f"{tail!r} is no weight of calibration text {name}: give a number above 0, as in {name}=2")
    return Part(name, weight)


def quotas(weights: list[float], total: int) -> list[int]:
    """`total` shared out by weight, in whole numbers: the largest remainders get what rounding down leaves."""
    exact = [total * weight / sum(weights) for weight in weights]
    found = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: found[index] - exact[index])
    for index in by_remainder[: total - sum(found)]:
        found[index] += 1
    return found


def label(names: list[str], given: list[Part]) -> str:
    """The texts in words, by the names that reports have for them."""
    words = [name if part.weight == 1 else f"{name} ×{part.weight:g}" for name, part in zip(names, given, strict=True)]
    return ", ".join(words)
