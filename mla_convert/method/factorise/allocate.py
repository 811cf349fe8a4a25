"""Shares a cache budget among layers: more rank and rotary dims where a number less costs more. Imports no torch."""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass

from mla_convert.method.factorise.sizes import LayerSize, Plan

# Decode kernels are written for sizes up to these.
MAX_RANK = 576
MAX_ROPE = 128


@dataclass(frozen=True)
class LayerLoss:
    """Loss of one layer, in nats per token, measured at some ranks (the full one among them) and at some rotary dims.

    A layer without RoPE has one entry by rotary dims, for none.
    """

    rank: dict[int, float]
    rope: dict[int, float]


def most_rank(plan: Plan, loss: LayerLoss) -> int:
    """Highest rank that a layer may get."""
    return min(max(MAX_RANK, plan.rank), max(loss.rank))


def most_rope(plan: Plan, unit: int) -> int:
    """Most rotary dims that a layer may get: never all, which is another kind of layer, without content keys."""
    return max(0, min(max(MAX_ROPE, plan.rope_dim), plan.shape.full_rope_dim - unit) // unit * unit)


def probes(plan: Plan, unit: int) -> tuple[list[int], list[int]]:
    """Ranks and rotary dims worth measuring, ascending: around the plan's, closer together near it."""
    ranks = {_round(plan.rank * share, unit) for share in (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3)}
    ropes = {_round(plan.rope_dim * share, unit) for share in (0, 0.33, 0.67, 1, 1.33, 2)} | {most_rope(plan, unit)}
    return (
        [*sorted(rank for rank in ranks | {unit} if unit <= rank < plan.full_rank), plan.full_rank],
        sorted(rope for rope in ropes if rope <= most_rope(plan, unit)),
    )


def _round(value: float, unit: int) -> int:
    return round(value / unit) * unit


def curve(measured: dict[int, float], unit: int, most: int, floor: float = 0.0) -> list[float]:
    """Loss at 0, unit, 2 unit, … most: geometric between what was measured, made convex; `floor` is taken off first."""
    sizes = sorted(measured)
    if len(sizes) == 1:
        return [measured[sizes[0]] - floor] * (most // unit + 1)
    losses = [max(measured[size] - floor, 1e-12) for size in sizes]
    points = []
    for size in range(0, most + 1, unit):
        right = min(max(next((i for i, known in enumerate(sizes) if known >= size), len(sizes) - 1), 1), len(sizes) - 1)
        share = (size - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
        points.append(math.exp((1 - share) * math.log(losses[right - 1]) + share * math.log(losses[right])))
    return _convex(points)


def _convex(values: list[float]) -> list[float]:
    """The largest convex, non-increasing curve that is nowhere above."""
    values = [min(values[: i + 1]) for i in range(len(values))]
    hull: list[int] = []
    for i, value in enumerate(values):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (values[b] - values[a]) * (i - a) < (value - values[a]) * (b - a):
                break
            hull.pop()
        hull.append(i)
    found = list(values)
    for a, b in itertools.pairwise(hull):
        for i in range(a, b):
            found[i] = values[a] + (values[b] - values[a]) * (i - a) / (b - a)
    return found


def allocate(plan: Plan, losses: list[LayerLoss], unit: int, rope_weight: float) -> tuple[LayerSize, ...]:
    """Sizes of every layer, multiples of `unit`, that spend at most the plan's numbers and lose least in all.

    A layer's losses by rank and by rotary dims are added. All curves are convex, so handing out the budget one unit at a
    time to whoever gains most is exact.

    :param rope_weight: on losses by rotary dims.
    """
    limits = [(most_rank(plan, loss), min(most_rope(plan, unit), max(loss.rope))) for loss in losses]
    curves = [
        (
            # whole rank still loses what the plan's rotary dims lose
            curve(loss.rank, unit, most[0], floor=loss.rank[max(loss.rank)]),
            [rope_weight * value for value in curve(loss.rope, unit, most[1])],
        )
        for loss, most in zip(losses, limits, strict=True)
    ]
    # no layer goes without rotary dims: what calibration saw says little about the distances that it did not see
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
