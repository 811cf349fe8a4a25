"""Calibration on several texts: their names and weights. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from mla_convert.core.errors import InputError

# The default calibration texts: packaged, so that they need no network and are the same everywhere; of many kinds, because a
# latent keeps the directions that calibration contains and little else. They have no text in common with the packaged suite.
PACKAGED = (
    "package:mla_demo/calibration.txt.gz",
    "package:mla_texts/calibration/documentation.txt.gz",
    "package:mla_texts/calibration/python.txt.gz",
    "package:mla_texts/calibration/code.txt.gz",
    "package:mla_texts/calibration/mathematics.txt.gz",
    "package:mla_texts/calibration/languages.txt.gz",
    "package:mla_texts/calibration/well_known.txt.gz",
)
PACKAGED_LABEL = "the texts packaged with mla_convert"
# `hub:KIND` is a text of the Hub mixture (`hub_mixture.py`).
HUB = "hub:"
HUB_KINDS = ("web", "code", "mathematics", "dialogue", "languages")
# Names of several texts, which share the weight of the name.
MIXTURES = {"package": PACKAGED, "hub": tuple(HUB + kind for kind in HUB_KINDS)}


@dataclass(frozen=True)
class Part:
    """A text, by its name for `texts.load_text`, and its weight among the texts."""

    spec: str
    weight: float = 1.0

    def __str__(self) -> str:
        """The form that `parts` reads."""
        return self.spec if self.weight == 1 else f"{self.spec}={self.weight:g}"


def parts(given: str | list[str] | None, purpose: str = "calibration") -> list[Part]:
    """The texts of a calibration, or of a healing run.

    Args:
        given: one text or several, each optionally with `=WEIGHT` at its end (default 1); `package` and `hub` are
            all texts of MIXTURES; None: the packaged texts, each with weight 1.
        purpose: of the texts, for messages.

    Raises:
        InputError: an invalid weight, or a text that is given twice.
    """
    texts = []
    for spec in [given] if isinstance(given, str) else given or PACKAGED:
        part = _part(spec, purpose)
        several = MIXTURES.get(part.spec, ()) if purpose != "task" and not Path(part.spec).is_file() else ()
        texts += [Part(name, part.weight / len(several)) for name in several] or [part]
    names = [part.spec for part in texts]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{purpose} text {name} is given twice: give it once, with a weight ({name}=2)")
    return texts


def _part(spec: str, purpose: str) -> Part:
    name, _, tail = spec.rpartition("=")
    if not name or Path(spec).expanduser().exists():  # a file's name may contain an equals sign
        return Part(spec)
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise InputError(f"{tail!r} is no weight of {purpose} text {name}: give a number above 0, as in {name}=2")
    return Part(name, weight)


def quotas(weights: list[float], total: int) -> list[int]:
    """Integers with the sum `total` in proportion to the weights, by the largest-remainder method."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [math.floor(value) for value in exact]
    # Shares that are rounded one by one would not keep the sum.
    by_remainder = sorted(range(len(exact)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


def label(names: list[str], given: list[Part]) -> str:
    """The texts in words, by their labels in reports (`names`), with weights other than 1."""
    words = [name if part.weight == 1 else f"{name} ×{part.weight:g}" for name, part in zip(names, given, strict=True)]
    return ", ".join(words)
