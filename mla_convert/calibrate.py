"""What a layer's factorisation needs to know of the data: second moments of its inputs, and what attention looks at."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_convert.activations import Activations
from mla_convert.factorise import Statistics
from mla_convert.families import Family
from mla_convert.skeleton import Skeleton

# Windows whose attention probabilities are looked at, and the longest part of one: a (heads, T, T) tensor each.
ATTENTION_WINDOWS = 32
ATTENTION_LENGTH = 1024


def _with_one(rows: Tensor) -> Tensor:
    """x -> [x; 1], so that biases are part of the linear algebra."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)


@torch.no_grad()
def second_moment(states: Activations, norm: nn.Module) -> Tensor:
    """E[x~ x~^T], float64 (d+1, d+1), where x~ = [norm(h); 1]: accumulated batch by batch, no activation is kept."""
    total = torch.zeros(states.hidden_size + 1, states.hidden_size + 1, dtype=torch.float64, device=states.device)
    for batch in states.batches():
        rows = _with_one(norm(states.get(batch)).float().flatten(0, 1))
        # float32 products of one batch, float64 sum over batches
        total += (rows.T @ rows).double()
    return total / (states.windows * states.length)


@torch.no_grad()
def attention_moments(
    states: Activations, layer: nn.Module, family: Family, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """What attention looks at, measured on real attention probabilities p of up to ATTENTION_WINDOWS windows.

    `kwargs` are the layer's keyword arguments for windows of length T <= ATTENTION_LENGTH under eager attention.

    Returns:
        distance: share of each head's attention by distance between query and key, float64 (H, T), rows sum to 1.
        key_moment: sum over tokens t of a_t x~_t x~_t^T, float64 (d+1, d+1), where a_t is the sum of p^2 over heads
            and queries: an error in a key or value that no query looks at costs nothing.
    """
    norm, attention = getattr(layer, family.input_norm), getattr(layer, family.attention)
    length = kwargs["position_embeddings"][0].shape[1]
    distance, moment = 0.0, 0.0
    for window in range(min(ATTENTION_WINDOWS, states.windows)):
        hidden = norm(states.get(slice(window, window + 1))[:, :length])
        weights = attention(hidden_states=hidden, **kwargs)[1][0].float()
        # the first key is looked at from everywhere whatever its distance is: it says nothing about distances
        distance = distance + diagonal_sums(F.pad(weights[:, :, 1:], (1, 0))).double()
        rows = _with_one(hidden[0].float())
        moment = moment + (rows.T @ (rows * weights.square().sum((0, 1))[:, None])).double()
    return distance / distance.sum(dim=1, keepdim=True).clamp_min(1e-30), moment


def diagonal_sums(weights: Tensor) -> Tensor:
    """Sum of causal weights (H, T, T) over each diagonal: (H, T), entry D for keys D positions before the query."""
    heads, length, _ = weights.shape
    # Laid out with one element more to a row, each row moves one column right: diagonals become columns.
    skewed = F.pad(weights.flip(2), (0, length)).flatten(1)[:, : length * (2 * length - 1)]
    return skewed.view(heads, length, 2 * length - 1).sum(1)[:, length - 1 :]


def attention_kwargs(skeleton: Skeleton, length: int) -> list[dict[str, Any]]:
    """Each layer's keyword arguments for `attention_moments` on windows of `length` tokens."""
    return skeleton.layer_kwargs(min(length, ATTENTION_LENGTH), eager=True)


def layer_statistics(skeleton: Skeleton, layer: nn.Module, states: Activations, kwargs: dict[str, Any]) -> Statistics:
    """All statistics of one layer, from the hidden states that enter it."""
    family = skeleton.source.family
    with skeleton.attention("eager"), skeleton.autocast():
        distance, key_moment = attention_moments(states, layer, family, kwargs)
    return Statistics(
        second_moment=second_moment(states, getattr(layer, family.input_norm)),
        distance=distance,
        inv_freq=skeleton.inv_freq.double(),
        key_moment=key_moment,
    )
