"""Allocates a cache budget in bytes to layers: more rank, rotary dims and bits where a byte less costs more. Imports no torch."""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass, field

from mla_convert.method.factorise.sizes import LayerSize, Plan

# Largest sizes that the decode kernels support.
MAX_RANK = 576
MAX_ROPE = 128


@dataclass(frozen=True)
class LayerLoss:
    """Loss of one layer in nats per token, measured at some sizes."""

    rank: dict[int, float]  # by rank, the full one among them
    rope: dict[int, float]  # by rotary dims; a layer without RoPE has one entry, for 0
    wide: dict[int, float] = field(default_factory=dict)  # by channels with 8 bits, where a cache mixes 8 and 4

    def times(self, count: int) -> LayerLoss:
        """The loss of a latent to which so many layers attend, each of which loses as much."""
        if count == 1:
            return self
        curves = ({size: loss * count for size, loss in each.items()} for each in (self.rank, self.rope, self.wide))
        return LayerLoss(*curves)


def most_rank(plan: Plan, loss: LayerLoss) -> int:
    """Largest rank that a layer may get."""
    return min(max(MAX_RANK, plan.rank), max(loss.rank))


def most_rope(plan: Plan, unit: int) -> int:
    """Most rotary dims that a layer may get: none if the plan has none, and never all, which is another structure."""
    if not plan.rope_dim:
        return 0
    return max(0, min(max(MAX_ROPE, plan.rope_dim), plan.shape.full_rope_dim - unit) // unit * unit)


def probes(plan: Plan, unit: int) -> tuple[list[int], list[int]]:
    """Ranks and rotary dims to measure, ascending: around the plan's, closer together near it."""
    ranks = {_round(plan.rank * factor, unit) for factor in (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3)}
    ropes = {_round(plan.rope_dim * factor, unit) for factor in (0, 0.33, 0.67, 1, 1.33, 2)} | {most_rope(plan, unit)}
    return (
        [*sorted(rank for rank in ranks | {unit} if unit <= rank < plan.full_rank), plan.full_rank],
        sorted(rope for rope in ropes if rope <= most_rope(plan, unit)),
    )


def _round(value: float, unit: int) -> int:
    return round(value / unit) * unit


def curve(measured: dict[int, float], unit: int, most: int, floor: float = 0.0) -> list[float]:
    """Convex curve of the loss at 0, unit, 2 unit, … most.

    Args:
        measured: loss by size; between sizes its logarithm is interpolated linearly.
        unit: distance of the curve's points.
        most: size of the last point.
        floor: subtracted from every loss first.
    """
    sizes = sorted(measured)
    if len(sizes) == 1:
        return [measured[sizes[0]] - floor] * (most // unit + 1)
    losses = [max(measured[size] - floor, 1e-12) for size in sizes]
    points = []
    for size in range(0, most + 1, unit):
        right = min(max(next((i for i, known in enumerate(sizes) if known >= size), len(sizes) - 1), 1), len(sizes) - 1)
        weight = (size - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
        points.append(math.exp((1 - weight) * math.log(losses[right - 1]) + weight * math.log(losses[right])))
    return _convex(points)


def _convex(values: list[float]) -> list[float]:
    """The largest convex, non-increasing curve that is nowhere above `values`: their lower convex hull."""
    values = [min(values[: i + 1]) for i in range(len(values))]
    hull: list[int] = []
    for i, value in enumerate(values):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (values[b] - values[a]) * (i - a) < (value - values[a]) * (b - a):
                break
            hull.pop()
        hull.append(i)
    result = list(values)
    for a, b in itertools.pairwise(hull):
        for i in range(a, b):
            result[i] = values[a] + (values[b] - values[a]) * (i - a) / (b - a)
    return result


def wide_probes(plan: Plan, unit: int) -> list[int]:
    """Numbers of channels with 8 bits to measure, ascending."""
    shares = {_round(plan.rank * share, unit) for share in (0, 0.125, 0.25, 0.5, 1)}
    return sorted({min(share, plan.rank // unit * unit) for share in shares})


def allocate(plan: Plan, losses: list[LayerLoss], unit: int, rope_weight: float) -> tuple[LayerSize, ...]:
    """Sizes of every layer that spend at most the plan's budget with the least total loss.

    Where one unit of each kind in every layer takes more than the budget, every layer gets the plan's own size.

    A layer's losses by rank, by rotary dims and by bits are added. All curves are convex, so giving the budget unit by unit
    to the layer that gains most per byte is optimal where units cost the same (greedy marginal analysis, Fox 1966).

    Args:
        plan: the bytes of its mean sizes are the budget.
        losses: of every layer.
        unit: of which all sizes are multiples.
        rope_weight: factor on losses by rotary dims.
    """
    return _Budget(plan, losses, unit, rope_weight).spend()


class _Budget:
    """Bytes that layers compete for. A size is a list [rank, rotary dims, channels with 8 bits]."""

    def __init__(self, plan: Plan, losses: list[LayerLoss], unit: int, rope_weight: float):
        self.plan, (self.rank_unit, self.rope_unit) = plan, plan.cache.units(unit)
        self.units = (self.rank_unit, self.rope_unit, self.rank_unit)
        # bytes of a unit, without the padding of rows
        code = {"bf16": 2.0, "int4": 0.5, "mixed": 0.5}.get(plan.cache.kind, 1.0)
        key = {"bf16": 2.0, "int4": 0.5}.get(plan.cache.rope, 1.0)
        self.costs = (self.rank_unit * code, self.rope_unit * key, self.rank_unit / 2)
        self.plans = [plan.of(layer) for layer in plan.shape.caching_layers]
        self.limits = [self._limits(own, loss) for own, loss in zip(self.plans, losses, strict=True)]
        self.curves = [
            (
                # the loss at full rank is that of the plan's rotary dims
                curve(loss.rank, self.rank_unit, most[0], floor=loss.rank[max(loss.rank)]),
                [rope_weight * value for value in curve(loss.rope, self.rope_unit, most[1])],
                curve(loss.wide, self.rank_unit, most[2]) if most[2] else [0.0],
            )
            for loss, most in zip(losses, self.limits, strict=True)
        ]
        # every layer keeps some rotary dims: calibration says little about distances longer than its windows
        self.sizes = [[self.rank_unit, min(self.rope_unit, most[1]), 0] for most in self.limits]
        mean = plan.row_bytes if plan.budget is None else plan.budget
        self.left = len(losses) * mean - sum(map(self._bytes, self.sizes))
        self.queue: list[tuple[float, int, int]] = []

    def _limits(self, plan: Plan, loss: LayerLoss) -> tuple[int, int, int]:
        most = most_rank(plan, loss)
        return most, min(most_rope(plan, self.rope_unit), max(loss.rope)), most if loss.wide else 0

    def _bytes(self, size: list[int]) -> int:
        return self.plan.cache.row_bytes(LayerSize(*size))

    def _offer(self, layer: int, kind: int) -> None:
        size = self.sizes[layer][kind]
        if size + self.units[kind] <= self.limits[layer][kind]:
            gains = self.curves[layer][kind]
            index = size // self.units[kind]
            heapq.heappush(self.queue, ((gains[index + 1] - gains[index]) / self.costs[kind], layer, kind))

    def spend(self) -> tuple[LayerSize, ...]:
        """The sizes once nothing more fits."""
        if self.left < 0:
            return tuple(self.plan.layer(layer) for layer in self.plan.shape.caching_layers)
        for layer in range(len(self.sizes)):
            for kind in range(3):
                self._offer(layer, kind)
        while self.queue:
            _, layer, kind = heapq.heappop(self.queue)
            size = list(self.sizes[layer])
            size[kind] += self.units[kind]
            if size[2] > size[0]:  # of channels that the layer does not have
                continue
            more = self._bytes(size) - self._bytes(self.sizes[layer])
            if more > self.left:
                continue
            self.sizes[layer], self.left = size, self.left - more
            self._offer(layer, kind)
            if kind == 0 and size[2] == size[0] - self.rank_unit:
                self._offer(layer, 2)
        full = [
            own.cache.possible(own.shape.full_rank(rope))
            for own, (_, rope, _) in zip(self.plans, self.sizes, strict=True)
        ]
        return tuple(
            LayerSize(min(rank, most), rope, min(wide, most))
            for (rank, rope, wide), most in zip(self.sizes, full, strict=True)
        )
