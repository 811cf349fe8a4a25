"""What a layer's factorisation needs to know of the data: second moments of its inputs, and what attention looks at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_convert.core.errors import InputError
from mla_convert.method.calibrate.attention_forward import ATTENTION_LENGTH
from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.calibrate.layerwise import LayerwiseModel
from mla_convert.modeling.modeling_mla import MlaAttention
from mla_convert.source.families import Family

# Hidden states (B, T, hidden) -> rows (B, T, n).
Rows = Callable[[Tensor], Tensor]

# Windows whose attention probabilities are looked at, and the longest part of one: a (heads, T, T) tensor each.
ATTENTION_WINDOWS = 32


def _with_one(rows: Tensor) -> Tensor:
    """x -> [x; 1], so that biases are part of the linear algebra."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)


@torch.no_grad()
def second_moment(states: Activations, norm: Rows) -> Tensor:
    """E[x~ x~^T], float64 (d+1, d+1), where x~ = [norm(h); 1]: accumulated batch by batch, no activation is kept."""
    total = 0.0
    for batch in states.batches():
        rows = _with_one(norm(states.get(batch)).float().flatten(0, 1))
        # float32 products of one batch, float64 sum over batches
        total = total + (rows.T @ rows).double()
    return total / (states.windows * states.length)


@torch.no_grad()
def head_moments(states: Activations, rows_of: Rows, heads: int) -> Tensor:
    """The same for each head's part of rows (B, T, heads * n): float64 (heads, n+1, n+1)."""
    total = 0.0
    for batch in states.batches():
        rows = _with_one(rows_of(states.get(batch)).float().flatten(0, 1).unflatten(-1, (heads, -1))).transpose(0, 1)
        total = total + (rows.mT @ rows).double()
    return total / (states.windows * states.length)


@torch.no_grad()
def attention_moments(
    states: Activations, layer: nn.Module, family: Family, kwargs: dict[str, Any], key_value: Rows = lambda rows: rows
) -> tuple[Tensor, Tensor]:
    """What attention looks at, measured on real attention probabilities p of up to ATTENTION_WINDOWS windows.

    `kwargs` are the layer's keyword arguments for windows of length T <= ATTENTION_LENGTH under eager attention;
    `key_value` makes what keys and values are linear functions of (x~) from the attention's input.

    Returns:
        distance: share of each head's attention by distance between query and key, float64 (H, T), rows sum to 1.
        key_moment: sum over tokens t of a_t x~_t x~_t^T, float64 (d+1, d+1), where a_t is the sum of p^2 over heads
            and queries: an error in a key or value that no query looks at costs nothing.
    """
    norm, attention = family.entry(layer), getattr(layer, family.attention)
    length = min(states.length, ATTENTION_LENGTH)
    distance, moment = 0.0, 0.0
    for window in range(min(ATTENTION_WINDOWS, states.windows)):
        hidden = norm(states.get(slice(window, window + 1))[:, :length])
        weights = attention(hidden_states=hidden, **kwargs)[1][0].float()
        # the first key is looked at from everywhere whatever its distance is: it says nothing about distances
        distance = distance + diagonal_sums(F.pad(weights[:, :, 1:], (1, 0))).double()
        rows = _with_one(key_value(hidden)[0].float())
        moment = moment + (rows.T @ (rows * weights.square().sum((0, 1))[:, None])).double()
    return distance / distance.sum(dim=1, keepdim=True).clamp_min(1e-30), moment


def diagonal_sums(weights: Tensor) -> Tensor:
    """Sum of causal weights (H, T, T) over each diagonal: (H, T), entry D for keys D positions before the query."""
    heads, length, _ = weights.shape
    # Laid out with one element more to a row, each row moves one column right: diagonals become columns.
    skewed = F.pad(weights.flip(2), (0, length)).flatten(1)[:, : length * (2 * length - 1)]
    return skewed.view(heads, length, 2 * length - 1).sum(1)[:, length - 1 :]


def layer_statistics(
    layerwise: LayerwiseModel,
    layer: nn.Module,
    states: Activations,
    kwargs: dict[str, Any],
    student: MlaAttention | None = None,
) -> Statistics:
    """All statistics of one layer, from the hidden states that enter it.

    `student` is the module to be: its norms, if it has some, say what keys, values and queries are linear functions of.

    Raises:
        InputError: they are not finite.
    """
    family = layerwise.source.family
    norm, key_value, query = family.entry(layer), lambda rows: rows, None
    if student is not None and student.normed:
        key_value = student.normed_key_value
        query = head_moments(states, lambda hidden: student.normed_query(norm(hidden)), student.num_heads)
    with layerwise.attention("eager"), layerwise.autocast():
        distance, key_moment = attention_moments(states, layer, family, kwargs, key_value)
    moment = second_moment(states, lambda hidden: key_value(norm(hidden)))
    if not all(torch.isfinite(part).all() for part in (moment, distance, key_moment)):
        raise InputError(
            f"the attention of layer {getattr(layer, family.attention).layer_idx} computes NaN or infinity on the calibration "
            f"text: its weights are too large to compute with, so the checkpoint is damaged; fetch it again"
        )
    return Statistics(
        second_moment=moment,
        distance=distance,
        inv_freq=layerwise.rotation(getattr(layer, family.attention).layer_idx, kwargs).inv_freq,
        key_moment=key_moment,
        query_moment=query,
    )


@dataclass(frozen=True)
class Statistics:
    """What calibration measured at one layer's attention."""

    second_moment: Tensor  # (d+1, d+1) E[x~ x~^T], x~ = [x; 1], x the input of the q, k and v projections
    distance: Tensor  # (H, T) attention probability by distance from query to key, rows sum to one
    inv_freq: Tensor  # (d_h/2,) radians per position, half-split layout; dims without rotation are zeros at the end
    # (d+1, d+1) sum_t a_t x~_t x~_t^T, where a_t = sum over heads and queries of the squared attention
    # probability that token t receives. Only its shape matters: it is scaled to a unit weight.
    key_moment: Tensor | None = None
    # (H, d_q+1, d_q+1) the same as second_moment for what each head's query is a function of, if that is not x
    query_moment: Tensor | None = None
