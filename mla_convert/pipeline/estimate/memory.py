"""Bytes of caches, of the memory of cards and of a conversion, before any weight is read. Imports no torch."""

from __future__ import annotations

import difflib
import operator
import re
from dataclasses import dataclass

from mla_convert.core.errors import InputError, UsageError
from mla_convert.method.factorise.sizes import UNIT, LayerSize, Plan

CONTEXTS = (4096, 32768, 131072)
BATCHES = (1, 8, 32)
# Memory of a card in GB as its vendor's data sheet prints it: nvidia.com/en-us/data-center/{h100,h200,a100,l4,l40s},
# the DGX B200 data sheet (1,440 GB on 8 cards), the GeForce RTX 3090, 4090 and 5090 specifications, and AMD's Instinct
# MI300X and MI325X data sheets. GB are powers of ten here; cards report a few percent more.
GPUS = {"3090": 24, "4090": 24, "5090": 32, "a100-40": 40, "a100-80": 80, "b200": 180, "h100": 80, "h200": 141,
        "l4": 24, "l40s": 48, "mi300x": 192, "mi325x": 256}  # fmt: skip
# Fraction of a card's memory for weights and cache; the rest is for activations, the runtime and fragmentation.
USABLE = 0.9
UNITS = {"": 1e9, "b": 1, "mb": 1e6, "gb": 1e9, "tb": 1e12, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True)
class CacheSize:
    """A KV cache of `width` numbers per token and layer, or by layer, `itemsize` bytes each.

    `windows`: the layers' sliding windows or None; `fixed`: bytes of a sequence's states that do not grow with the context.
    """

    width: float | tuple[float, ...]
    itemsize: int
    windows: tuple[int | None, ...]
    fixed: int = 0

    def growing(self, context: int, batch: int = 1) -> int:
        """Bytes for `batch` sequences of `context` tokens, without fixed states.

        A layer with a sliding window holds at most as many tokens as its window.
        """
        held = [min(context, window) if window else context for window in self.windows]
        widths = self.width if isinstance(self.width, tuple) else (self.width,) * len(held)
        return int(batch * sum(map(operator.mul, held, widths)) * self.itemsize)

    def bytes(self, context: int, batch: int = 1) -> int:
        """Bytes for `batch` sequences of `context` tokens, with their fixed states."""
        return self.growing(context, batch) + batch * self.fixed

    def largest_batch(self, room: int, context: int) -> int:
        """Number of sequences of `context` tokens that fit `room` bytes."""
        return max(0, room) // self.bytes(context)

    def largest_context(self, room: int, batch: int, limit: int) -> int:
        """Longest sequence in tokens, at most `limit`, when `batch` sequences share `room` bytes."""
        # By bisection, because layers with a window stop growing at it.
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bytes(middle, batch) <= room else (low, middle - 1)
        return low


def card_memory(gpu: str | None, memory: str | None) -> int | None:
    """Bytes of memory; None if neither argument is given.

    Args:
        gpu: Name of a card (`h100`).
        memory: A size as typed (`80GB`, `80GiB`, `80`).

    Raises:
        UsageError: Both are given, or the size cannot be read.
        InputError: The card is not in the table.
    """
    if gpu and memory:
        raise UsageError("--gpu and --memory are two ways to say one thing: give one of them")
    if gpu:
        name = gpu.lower().replace("_", "-").removeprefix("rtx-").removeprefix("rtx")
        if name not in GPUS:
            near = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(f"GPU {gpu!r} is not known: {hint}known are {', '.join(GPUS)}; or give --memory 80GB")
        return int(GPUS[name] * 1e9)
    if memory:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", memory.strip().lower())
        if not match or match[2] not in UNITS or not float(match[1]):
            raise UsageError(f"memory {memory!r} is no size: give a number with a unit, such as 80GB or 80GiB")
        return int(float(match[1]) * UNITS[match[2]])
    return None


def fit(room: int, cache: CacheSize, limit: int) -> dict[str, dict[str, int]]:
    """Largest batch by context, and largest context (at most `limit`) by batch, in `room` bytes."""
    return {
        "largest_batch_at_context": {str(context): cache.largest_batch(room, context) for context in CONTEXTS},
        "largest_context_at_batch": {str(batch): cache.largest_context(room, batch, limit) for batch in BATCHES},
    }


def warnings(plan: Plan) -> list[str]:
    """Properties of a plan that its user may not have meant, one sentence each."""
    lines = []
    if plan.cache_ratio >= 1:
        how = "larger than" if plan.cache_ratio > 1 else "as large as"
        lines.append(f"the cache is {how} the original's: a smaller rank saves memory")
    if plan.rank >= plan.full_rank:
        lost = "nothing but what rounding takes" if plan.cache.quantised else "nothing"
        lines.append(f"rank {plan.rank} is full rank: the latent loses {lost}, and a higher one is not possible")
    layers = plan.shape.converted_layers
    still = sum(not plan.shape.has_rope(layer) for layer in layers)
    if plan.nope_dim and still:
        lines.append(
            f"{still} of {len(layers)} layers have no RoPE and keep heads of {plan.shape.head_dim} content dims, as all layers "
            f"of an export do"
        )
    sizes = plan.layers if plan.shape.heads else [LayerSize(plan.rank, plan.rope_dim)]
    each = [("rank", {size.rank for size in sizes}), ("rope-dim", {size.rope_dim for size in sizes})]
    each.append(("nope-dim", {plan.nope_dim or 0}))
    for name, value in ((name, value) for name, values in each for value in sorted(values)):
        if value % UNIT:
            lower = value // UNIT * UNIT
            near = f"{lower} or {lower + UNIT}" if lower else f"{UNIT}"
            lines.append(f"{name} {value} is not a multiple of {UNIT}, which attention kernels prefer: {near} is")
    return lines


HOST_BASIS = (
    "on a CPU, beside about 1 GB of libraries; added up, not measured: the larger of reading the embedding table (mapped "
    "and copied) and one layer in float32 with its statistics, its refinement and the hidden states that travel with it"
)


def peak_host_bytes(
    table: int, layer: int, attention: int, hidden: int, itemsize: int, calibration_tokens: int, evaluation_tokens: int
) -> dict[str, int]:
    """Host memory in bytes at the two moments of a conversion on a CPU that can be its peak (`HOST_BASIS`).

    The table is mapped and copied as it is read (measured: twice its bytes). A layer is held as stored and in float32; its
    new attention with gradient, Adam's two moments and the best state; its statistics are about six float64 matrices of
    hidden size. Three sets of hidden states of the calibration text (original, converted, targets) and two of the evaluation
    text are held in float32.

    Args:
        table: Elements of the largest tensor outside the layers.
        layer: Elements of one layer.
        attention: Elements of its converted attention.
        hidden: Width of the residual stream.
        itemsize: Bytes of a stored element.
        calibration_tokens: Tokens of the calibration text.
        evaluation_tokens: Tokens that perplexity is measured on.
    """
    streams = 4 * hidden * (3 * calibration_tokens + 2 * evaluation_tokens)
    held = layer * (itemsize + 4) + attention * 4 * 5 + 6 * 8 * (hidden + 1) ** 2
    return {"embedding table": table * itemsize * 2, "one layer": held + streams}


GPUS_BASIS = (
    "added up, not measured: one layer or block with its statistics, its refinement and this process's share of the hidden "
    "states; of the host, those that do not fit the card, the evaluation's and the layers as stored"
)


@dataclass(frozen=True)
class GpuRun:
    """Sizes on which the memory of a conversion on GPUs depends: elements of weights, tokens of texts, layers in memory."""

    hidden: int
    layer: int
    attention: int
    head: int
    itemsize: int  # of a stored element, bytes
    calibration_tokens: int
    evaluation_tokens: int
    step_tokens: int
    block: int  # layers that are refined together
    output_layers: int  # layers of the output steps; 0 without any

    def device_bytes(self, processes: int, limit: int) -> int:
        """Bytes on each of several cards; sets of hidden states larger than `limit` bytes are on the host."""
        states = self._states(processes)
        sets = 5 if self.block > 1 else 3  # original, converted, targets; and copies of two before a block
        held = max(self.block, self.output_layers)
        tokens = -(-self.step_tokens // processes)
        # float32 weights; a student with its gradient, moments and best state; activations for the backward pass
        layers = held * (4 * self.layer + 5 * 4 * self.attention + 60 * tokens * self.hidden)
        statistics = 6 * 8 * (self.hidden + 1) ** 2
        return (
            layers
            + statistics
            + (sets * states if states <= limit else 0)
            + (2 * self.head if self.output_layers else 0)
        )

    def host_bytes(self, processes: int, limit: int) -> int:
        """Bytes of host memory in each of several processes."""
        states, evaluated = self._states(processes), 2 * 4 * self.hidden * self.evaluation_tokens // processes
        sets = 5 if self.block > 1 else 3
        # one layer more is read, and one is written, while the others are converted
        stored = (max(self.block, self.output_layers, 1) + 2) * self.layer * self.itemsize
        return stored + evaluated + (sets * states if states > limit else 0)

    def _states(self, processes: int) -> int:
        """Bytes of one set of hidden states of the calibration text, bfloat16."""
        return 2 * self.hidden * -(-self.calibration_tokens // processes)
