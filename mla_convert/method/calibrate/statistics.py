"""Statistics of the calibration text for a layer's factorisation: second moments of its inputs, weighted by attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_convert.core.errors import InputError
from mla_convert.method.calibrate.attention_forward import ATTENTION_LENGTH
from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.calibrate.layerwise import LayerKwargs, LayerwiseModel
from mla_convert.modeling.attention_mla import MlaAttention
from mla_convert.source.families import Family

# Hidden states (B, T, hidden) -> rows (B, T, n).
Rows = Callable[[Tensor], Tensor]

# Windows whose attention probabilities are measured.
ATTENTION_WINDOWS = 32


def _with_one(rows: Tensor) -> Tensor:
    """x~ = [x; 1], so that biases are part of the linear algebra."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)


@torch.no_grad()
def second_moment(states: Activations, norm: Rows) -> Tensor:
    """E[x~ x~^T], float64 (d+1, d+1), with x~ = [norm(h); 1], accumulated batch by batch.

    Args:
        states: hidden states h.
        norm: of the layer's attention, or what else keys and values are linear functions of.
    """
    total = 0.0
    for batch in states.batches():
        rows = _with_one(norm(states.get(batch)).float().flatten(0, 1))
        # float32 products of one batch, float64 sum over batches
        total = total + (rows.T @ rows).double()
    return states.processes.sum(total) / (states.total * states.length)


@torch.no_grad()
def head_moments(states: Activations, rows_of: Rows, heads: int) -> Tensor:
    """E[x~ x~^T] of each head, float64 (heads, n+1, n+1).

    Args:
        states: hidden states.
        rows_of: hidden states -> rows (B, T, heads * n), of which head h has part h as its x.
        heads: number of heads.
    """
    total = 0.0
    for batch in states.batches():
        rows = _with_one(rows_of(states.get(batch)).float().flatten(0, 1).unflatten(-1, (heads, -1))).transpose(0, 1)
        total = total + (rows.mT @ rows).double()
    return states.processes.sum(total) / (states.total * states.length)


@torch.no_grad()
def gate_size(states: Activations, factors_of: Rows) -> Tensor:
    """Root mean square (n,), float64, of the factors that multiply an attention's output.

    Args:
        states: hidden states.
        factors_of: hidden states -> factors (B, T, n).
    """
    total = 0.0
    for batch in states.batches():
        total = total + factors_of(states.get(batch)).float().square().sum((0, 1)).double()
    return (states.processes.sum(total) / (states.total * states.length)).sqrt()


@torch.no_grad()
def attention_moments(
    states: Activations, layer: nn.Module, family: Family, kwargs: LayerKwargs, key_value: Rows = lambda rows: rows
) -> tuple[Tensor, Tensor]:
    """Distances and tokens that a layer attends to, from the probabilities p of up to ATTENTION_WINDOWS windows.

    Args:
        states: hidden states before the layer.
        layer: of the source model.
        family: of the source model.
        kwargs: the layer's keyword arguments for windows of length T <= ATTENTION_LENGTH under eager attention.
        key_value: normed hidden states -> x, of which keys and values are linear functions.

    Returns:
        distance: probability of each distance from query to key, by head, float64 (H, T); rows sum to 1.
        key_moment: sum over tokens t of a_t x~_t x~_t^T, float64 (d+1, d+1), where a_t is the sum of p^2 over heads
            and queries: an error in a key or value that no query attends to costs nothing.
    """
    norm, attention = family.entry(layer), getattr(layer, family.attention)
    length = min(states.length, ATTENTION_LENGTH)
    distance, moment = 0.0, 0.0
    own = states.own(range(min(ATTENTION_WINDOWS, states.total)))
    for window in own or [0]:
        hidden = norm(states.get(slice(window, window + 1))[:, :length])
        weights = attention(hidden_states=hidden, **kwargs)[1][0].float()
        # the first key is an attention sink (arXiv 2309.17453), attended to at any distance: it is not counted
        distance = distance + diagonal_sums(F.pad(weights[:, :, 1:], (1, 0))).double()
        rows = _with_one(key_value(hidden)[0].float())
        moment = moment + (rows.T @ (rows * weights.square().sum((0, 1))[:, None])).double()
    if not own:  # this process has none of them: its window gave only the shapes
        distance, moment = torch.zeros_like(distance), torch.zeros_like(moment)
    distance, moment = states.processes.sum(distance), states.processes.sum(moment)
    return distance / distance.sum(dim=1, keepdim=True).clamp_min(1e-30), moment


def diagonal_sums(weights: Tensor) -> Tensor:
    """Sums (H, T) of causal weights (H, T, T) over each diagonal; entry D is for keys D positions before the query."""
    heads, length, _ = weights.shape
    # With one more element in a row, each row moves one column to the right: diagonals become columns.
    skewed = F.pad(weights.flip(2), (0, length)).flatten(1)[:, : length * (2 * length - 1)]
    return skewed.view(heads, length, 2 * length - 1).sum(1)[:, length - 1 :]


def layer_statistics(
    layerwise: LayerwiseModel,
    layer: nn.Module,
    states: Activations,
    kwargs: LayerKwargs,
    student: MlaAttention | None = None,
) -> Statistics:
    """All statistics of one layer.

    Args:
        layerwise: the source model.
        layer: one of its layers, loaded.
        states: hidden states before the layer.
        kwargs: the layer's keyword arguments under eager attention, as from `attention_kwargs`.
        student: the attention to be filled; if it has norms on queries and keys, they make the vectors of which keys, values
            and queries are linear functions.

    Raises:
        InputError: they are not finite.
    """
    family = layerwise.source.family
    norm, key_value, query, gate = family.entry(layer), lambda rows: rows, None, None
    if student is not None and student.normed:
        key_value = student.normed_key_value
        query = head_moments(states, lambda hidden: student.normed_query(norm(hidden)), student.num_heads)
    if student is not None and student.gate is not None:
        gate = gate_size(states, lambda hidden: student.query_and_gate(norm(hidden))[1])
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
        gate=gate,
    )


@dataclass(frozen=True)
class Statistics:
    """Measurements at one layer's attention."""

    second_moment: Tensor  # (d+1, d+1) E[x~ x~^T], x~ = [x; 1], x the input of the q, k and v projections
    distance: Tensor  # (H, T) attention probability by distance from query to key; rows sum to 1
    inv_freq: Tensor  # (d_h/2,) radians per position, half-split layout; dims without rotation are zeros at the end
    # (d+1, d+1) sum_t a_t x~_t x~_t^T, where a_t = sum over heads and queries of the squared attention
    # probability that token t receives. Only its shape matters: it is scaled to a unit weight.
    key_moment: Tensor | None = None
    # (H, d_q+1, d_q+1) second moment of the vector of which each head's query is a linear function, if that is not x
    query_moment: Tensor | None = None
    # (H*d_h,) root mean square of the factors that multiply the attention's output, where it has a gate
    gate: Tensor | None = None
