"""The head of a causal language model on its own: hidden states to logits."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions


@dataclass
class DecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """Whatever the head of some family asks a decoder's output for."""

    router_logits: tuple[Tensor, ...] | None = None


class HiddenStatesStub(nn.Module):
    """Stands for a model's decoder: returns given hidden states (1, T, hidden) whatever comes in."""

    def __init__(self):
        super().__init__()
        self.hidden: Tensor | None = None

    @property
    def decoder(self) -> HiddenStatesStub:
        """OPT's head calls the decoder inside the decoder."""
        return self

    def forward(self, *_, **__) -> DecoderOutput:
        return DecoderOutput(last_hidden_state=self.hidden)


class Head:
    """A causal language model's head: hidden states (N, d) to logits (N, vocabulary), with all that its class does to them.

    Holds the model's own modules and no copy of a weight.
    """

    def __init__(self, model: nn.Module):
        self._given = HiddenStatesStub()
        self._model = copy.copy(model)
        self._model._modules = dict(model._modules)
        setattr(self._model, model.base_model_prefix, self._given)
        self.output = model.get_output_embeddings()

    @property
    def parameters(self) -> list[Tensor]:
        """Those that are trained."""
        return [parameter for parameter in self.output.parameters() if parameter.requires_grad]

    def __call__(self, hidden: Tensor) -> Tensor:
        self._given.hidden = hidden[None]
        try:
            return self._model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits[0]
        finally:
            self._given.hidden = None
