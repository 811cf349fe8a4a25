"""What the conversion has to know of a model family: where its attention lies. One instance a family, in its own file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Names inside a transformers model of one family. Everything else is read from the model itself."""

    model_type: str
    """The `model_type` of its configuration."""

    examples: str
    """Checkpoints of this family, for messages and docs."""

    special: str = ""
    """What sets its attention apart."""

    layers: str = "model.layers"
    """Path of the list of decoder layers."""

    attention: str = "self_attn"
    """Name of the attention in a layer."""

    input_norm: str = "input_layernorm"
    """Name of the norm whose output the attention reads; the attention's output is added to that norm's input."""

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
