"""Cosines and sines of every layer's rotary planes, computed once a step for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mla_convert.source.families import FAMILIES

# RoPE types with frequencies that do not depend on the length.
STATIC = ("default", "linear", "llama3", "yarn", "proportional")


class Reference:
    """Facts of the transformers model: the table of frequencies, their scaling, and each layer's softmax scale."""

    def __init__(self, config: Any, max_model_len: int):
        """Build the model without weights.

        Raises:
            ValueError: RoPE that a table of frequencies does not describe.
        """
        kind = check_rope(config, max_model_len)
        # Engines build models with their device and dtype as defaults, in which the frequencies would be rounded.
        with torch.device("cpu"), init_empty_weights(include_buffers=False):
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
            try:
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            finally:
                torch.set_default_dtype(before)
        decoder = model.get_submodule(config.mla_layers.rpartition(".")[0])
        rotary = getattr(decoder, "rotary_emb", None)
        if rotary is None or not isinstance(getattr(rotary, "inv_freq", None), Tensor):
            raise ValueError(f"RoPE of type {kind} of {config.model_type} has no single table of frequencies")
        self.inv_freq = rotary.inv_freq.detach().float().cpu()
        self.scaling = float(rotary.attention_scaling)
        layers = model.get_submodule(config.mla_layers)
        self.softmax_scales = [float(getattr(layer, config.mla_attention).scaling) for layer in layers]


def check_rope(config: Any, max_model_len: int) -> str:
    """The type of a model's RoPE.

    Raises:
        ValueError: its frequencies depend on the length.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = str(parameters.get("rope_type", "default"))
    if kind == "longrope":
        original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        if max_model_len > original:
            raise ValueError(
                f"RoPE of type longrope changes its frequencies beyond {original} tokens: serve with --max-model-len {original} "
                f"(SGLang: --context-length)"
            )
    elif kind not in STATIC:
        raise ValueError(f"RoPE of type {kind} has frequencies that depend on the length, which engines do not follow")
    return kind


class LatentRotary(nn.Module):
    """The tables of all layers. A layer's planes are columns of the original's table, and layers may share theirs."""

    frequencies: Tensor

    def __init__(self, reference: Reference, model_type: str, planes: Sequence[int]):
        """Make room for the planes of all layers.

        Args:
            reference: facts of the original.
            model_type: of the family, whose table may hold a frequency in several columns.
            planes: number of planes of each layer, those that pad it included.
        """
        super().__init__()
        self.stride = FAMILIES[model_type].freq_stride
        self.scaling = reference.scaling
        self.inv_freq = reference.inv_freq
        self.planes = list(planes)
        self.places = [0] * len(self.planes)
        self.cos = self.sin = torch.empty(0)
        few = len(self.inv_freq)
        # The planes are known when the weights are loaded; until then they are spread over the table.
        spread = [[plane * few // count * self.stride for plane in range(count)] for count in self.planes]
        self.register_buffer("frequencies", torch.empty(0), persistent=False)
        self.place(spread)

    def place(self, columns: Sequence[Sequence[int]]) -> None:
        """Set the planes of every layer.

        Args:
            columns: for each layer, columns of the original's table; planes beyond them do not turn.
        """
        tables: dict[tuple[int, ...], int] = {}
        frequencies: list[float] = []
        for layer, (chosen, planes) in enumerate(zip(columns, self.planes, strict=True)):
            key = (*(column // self.stride for column in chosen), *[-1] * (planes - len(chosen)))
            if key not in tables:
                tables[key] = len(frequencies)
                frequencies += [float(self.inv_freq[f]) if f >= 0 else 0.0 for f in key]
            self.places[layer] = tables[key]
        values = torch.tensor(frequencies, dtype=torch.float32)
        if values.numel() == self.frequencies.numel():
            self.frequencies.copy_(values)
        else:
            self.frequencies = values.to(self.frequencies.device)

    def prepare(self, positions: Tensor) -> None:
        """Compute the tables of a step for positions (T,)."""
        angles = positions.unsqueeze(-1).float() * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        self.cos, self.sin = (cos, sin) if self.scaling == 1.0 else (cos * self.scaling, sin * self.scaling)

    def of_layer(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (T, m) of a layer's planes, for the step's first `tokens` tokens."""
        first = self.places[layer]
        stop = first + self.planes[layer]
        return self.cos[:tokens, first:stop], self.sin[:tokens, first:stop]
