"""Allocates a cache budget to layers: more rank and rotary dims where an element less costs more. Imports no torch."""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass

from mla_convert.method.factorise.sizes import LayerSize, Plan

# Largest sizes that the decode kernels support.
MAX_RANK = 576
MAX_ROPE = 128


@dataclass(frozen=True)
class LayerLoss:
    """Loss of one layer in nats per token, measured at some sizes."""

    rank: dict[int, float]  # by rank, the full one among them
    rope: dict[int, float]  # by rotary dims; a layer without RoPE has one entry, for 0


def most_rank(plan: Plan, loss: LayerLoss) -> int:
    """Largest rank that a layer may get."""
    return min(max(MAX_RANK, plan.rank), max(loss.rank))


def most_rope(plan: Plan, unit: int) -> int:
    """Most rotary dims that a layer may get: never all, as a layer without content keys has another structure."""
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


def allocate(plan: Plan, losses: list[LayerLoss], unit: int, rope_weight: float) -> tuple[LayerSize, ...]:
    """Sizes of every layer that spend at most the plan's budget with the least total loss.

    A layer's losses by rank and by rotary dims are added. All curves are convex, so giving the budget unit by unit to the
    layer that gains most is optimal (greedy marginal analysis, Fox 1966).

    Args:
        plan: its mean sizes are the budget.
        losses: of every layer.
        unit: of which all sizes are multiples.
        rope_weight: factor on losses by rotary dims.
    """
    limits = [(most_rank(plan, loss), min(most_rope(plan, unit), max(loss.rope))) for loss in losses]
    curves = [
        (
            # the loss at full rank is that of the plan's rotary dims
            curve(loss.rank, unit, most[0], floor=loss.rank[max(loss.rank)]),
            [rope_weight * value for value in curve(loss.rope, unit, most[1])],
        )
        for loss, most in zip(losses, limits, strict=True)
    ]
    # every layer keeps some rotary dims: calibration says little about distances longer than its windows
    sizes = [[unit, min(unit, most[1])] for most in limits]
    left = len(losses) * plan.cache_width - sum(map(sum, sizes))
    queue: list[tuple[float, int, int]] = []

    def offer(layer: int, kind: int) -> None:
        size = sizes[layer][kind]
        if size + unit <= limits[layer][kind]:
            gains = curves[layer][kind]
            heapq.heappush(queue, (gains[size // unit + 1] - gains[size // unit], layer, kind))

    for layer in range(len(losses)):
        offer(layer, 0)
        offer(layer, 1)
    while queue and left >= unit:
        _, layer, kind = heapq.heappop(queue)
        sizes[layer][kind] += unit
        left -= unit
        offer(layer, kind)
    return tuple(LayerSize(min(rank, plan.shape.full_rank(rope)), rope) for rank, rope in sizes)
