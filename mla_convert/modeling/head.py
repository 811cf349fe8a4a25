"""The head of a causal language model without its decoder: hidden states to logits."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions


@dataclass
class DecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """A decoder's output with every field that the head of some family reads."""

    router_logits: tuple[Tensor, ...] | None = None
    cache: object | None = None
    shared_kv_states: object | None = None
    image_hidden_states: Tensor | None = None
    audio_hidden_states: Tensor | None = None
    image_outputs: object | None = None
    video_outputs: object | None = None
    rope_deltas: Tensor | None = None


class HiddenStatesStub(nn.Module):
    """Takes the place of a model's decoder and returns given hidden states.

    Attributes:
        hidden: (1, T, hidden), the states to return.
    """

    def __init__(self, decoder: nn.Module):
        """Stand in for `decoder`, without states; Falcon-H1's head reads a factor that the decoder holds."""
        super().__init__()
        vars(self).update({name: value for name, value in vars(decoder).items() if name.endswith("_multiplier")})
        self.hidden: Tensor | None = None

    @property
    def decoder(self) -> HiddenStatesStub:
        """The stub itself: OPT's head calls the decoder inside its decoder."""
        return self

    def forward(self, *_, **__) -> DecoderOutput:
        """The given states, for any input."""
        return DecoderOutput(last_hidden_state=self.hidden)


def decoder_name(model: Any) -> str:
    """Name of a causal language model's decoder, "" without one. Llama 4's is not its class's `base_model_prefix`."""
    embeddings = model.get_input_embeddings()
    holders = (
        name for name, part in model.named_children() if part is not embeddings and embeddings in [*part.modules()]
    )
    return next(holders, "")


class Head:
    """A causal language model's head: hidden states (N, d) to logits (N, vocabulary), as the model's class computes them.

    Shares the model's modules and copies no weight.
    """

    def __init__(self, model: nn.Module):
        """Take the head of `model`, which stays as it is."""
        name = decoder_name(model)
        self._stub = HiddenStatesStub(getattr(model, name))
        self._model = copy.copy(model)
        self._model._modules = dict(model._modules)
        setattr(self._model, name, self._stub)
        self.output = model.get_output_embeddings()

    @property
    def parameters(self) -> list[Tensor]:
        """The output layer's parameters that require gradients."""
        return [parameter for parameter in self.output.parameters() if parameter.requires_grad]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (N, vocabulary) of hidden states (N, d)."""
        self._stub.hidden = hidden[None]
        try:
            return self._model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits[0]
        finally:
            self._stub.hidden = None
