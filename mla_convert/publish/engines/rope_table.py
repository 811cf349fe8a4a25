"""One RoPE table for all layers, in the form of DeepSeek's configuration: theta ** (-2 i / qk_rope_head_dim)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mla_convert.core.errors import InputError
from mla_convert.method.factorise.sizes import TABLE

# Relative error in float32 of a frequency that is a power of theta.
TOLERANCE = 1e-5
CURE = "convert with --for vllm, or export with --profile hf-code, which keeps every plane"


@dataclass(frozen=True)
class RopeTable:
    """A table of `size` frequencies with the base `theta`; `slots`: for each layer, the table index of each plane."""

    theta: float
    size: int
    slots: list[list[int]]


def share_table(layers: list[list[int]], inv_freq: list[float], theta: float, limit: int | None = TABLE) -> RopeTable:
    """The table that contains the frequencies of every layer's planes; it may contain others.

    Args:
        layers: for each layer, the frequency of each plane as an index into `inv_freq`.
        inv_freq: radians per position of the source's RoPE, which must be theta ** (-f / len(inv_freq)).
        theta: base of the source's RoPE.
        limit: the table's size; None: the number of frequencies that are needed.

    Raises:
        InputError: there is no such table; says why and what to do.
    """
    count = len(inv_freq)
    powers = [theta ** (-f / count) for f in range(count)]
    if any(abs(found / power - 1) > TOLERANCE for found, power in zip(inv_freq, powers, strict=True)):
        raise InputError(
            f"the frequencies of this model's RoPE are no powers of one number: {CURE.partition(', or ')[2]}"
        )
    for layer, planes in enumerate(layers):
        twice = next((f for f in planes if planes.count(f) > 1), None)
        if twice is not None:
            raise InputError(
                f"layer {layer} keeps {planes.count(twice)} planes at frequency {twice}, and DeepSeek's RoPE has one for each: "
                f"{CURE}"
            )
    used = {f for planes in layers for f in planes}
    # Every step-th frequency of a source is again a power of one number. The divisor is 0 where only frequency 0 is
    # kept.
    step = math.gcd(*used) or 1 if used else 1
    needed = max(used, default=0) // step + 1
    if limit is not None and needed > limit:
        raise InputError(
            f"layers keep planes at frequencies up to {max(used)} in steps of {step}, and a table of DeepSeek's has {limit} in "
            f"even steps: {CURE}"
        )
    size = needed if limit is None else limit
    slots = [[f // step for f in planes] for planes in layers]
    exponent = step * size / count
    return RopeTable(theta if exponent == 1 else theta**exponent, size, slots)
