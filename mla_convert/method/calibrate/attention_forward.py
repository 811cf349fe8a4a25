"""Forward pass of one attention module between its norm and the residual stream, and the arguments that it takes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor, nn

from mla_convert.method.calibrate.layerwise import LayerKwargs, LayerwiseModel

# hidden states (B, L, d) at a layer's input -> what a module adds to them, float32 (B, L, d)
Forward = Callable[[Tensor], Tensor]

# Longest window on which attention probabilities are computed: a (heads, T, T) tensor each.
ATTENTION_LENGTH = 1024


def attention_forward(
    attention: nn.Module,
    norm: Callable[[Tensor], Tensor],
    kwargs: LayerKwargs,
    autocast: Callable[[], AbstractContextManager],
    after: Callable[[Tensor], Tensor] = lambda output: output,
    read: Callable[[Tensor], tuple[Tensor, dict]] = lambda hidden: (hidden, {}),
    residual: Callable[[Tensor], Tensor] | None = None,
) -> Forward:
    """The attention branch of a layer as a function of the residual stream.

    Args:
        attention: a stock attention, or the `MlaAttention` that replaces it.
        norm: applied to the residual stream before the attention.
        kwargs: the attention's keyword arguments (positions, mask) for windows of one length.
        autocast: context of the forward pass.
        after: applied to the output, as families with a norm or a scale behind the attention need.
        residual: the stream to which the attention adds, where that is not the hidden states: their difference from it is
            added to the output.
        read: the hidden states, and keyword arguments that depend on the windows, of hidden states and what is beside them.
    """

    def forward(hidden: Tensor) -> Tensor:
        states, own = read(hidden)
        with autocast():
            output = after(attention(hidden_states=norm(states), **kwargs | own)[0]).float()
            if residual is not None:
                output = output + residual(states).float() - states[..., : output.shape[-1]]
            return output

    return forward


def attention_kwargs(layerwise: LayerwiseModel, length: int) -> list[LayerKwargs]:
    """Keyword arguments of every layer for `statistics.attention_moments`, on windows of `length` tokens at most."""
    return layerwise.layer_kwargs(min(length, ATTENTION_LENGTH), eager=True)
