"""Formats in which the original can quantise its own cache, which is the alternative to a conversion. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NAMES = ("fp8", "int8", "int4", "int3", "int2", "int4-hadamard", "int3-hadamard", "int2-hadamard")
HADAMARD = "-hadamard"
# Numbers of a head with one scale: those of the published tables (docs/results/quality.md).
GROUP, HADAMARD_GROUP = 32, 64


@dataclass(frozen=True)
class OriginalCacheFormat:
    """How keys (after RoPE) and values of the original are quantised in its cache.

    Attributes:
        bits: of a number.
        group: numbers of a head that share a scale and a zero point of 16 bits each; 0 is FP8 (e4m3), with one scale for the
            keys and one for the values of a sequence and layer.
        hadamard: whether heads are multiplied by an orthonormal Hadamard matrix, which spreads outliers.
    """

    bits: int
    group: int
    hadamard: bool = False

    @classmethod
    def named(cls, name: str) -> OriginalCacheFormat:
        """The format of a name in `NAMES`."""
        if name == "fp8":
            return cls(8, 0)
        hadamard = name.endswith(HADAMARD)
        bits = int(name.removeprefix("int").removesuffix(HADAMARD))
        return cls(bits, HADAMARD_GROUP if hadamard else GROUP, hadamard)

    def group_of(self, width: int) -> int:
        """Numbers that share a scale in heads of `width` numbers: the largest divisor of the width that is at most `group`."""
        return next((size for size in range(min(self.group, width), 0, -1) if width % size == 0), 0)

    def bits_of(self, width: int) -> float:
        """Bits of a number in heads of `width` numbers, with scales and zero points; FP8's two scales are not counted."""
        return self.bits + 2 * 16 / self.group_of(width) if self.group else self.bits


def words(name: str) -> str:
    """A format as tables name it: INT4 + Hadamard."""
    return name.removesuffix(HADAMARD).upper() + (" + Hadamard" if name.endswith(HADAMARD) else "")


def format_names(value: object) -> list[str]:
    """Names of formats, each once, from what a recipe or an option gives: one text or a list, with commas between names.

    Raises:
        ValueError: there is none, or one that is no format.
    """
    parts: Sequence[object] = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else ()
    names = [name.strip() for part in parts for name in str(part).split(",")]
    for name in names or [""]:
        if name not in NAMES:
            raise ValueError(f"{name!r} is no format of a cache: give {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    return list(dict.fromkeys(names))
