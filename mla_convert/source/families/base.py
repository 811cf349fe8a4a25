"""What the conversion has to know of a model family: where its attention lies. One instance a family, in its own file.

Data only: names inside the stock transformers model, and which of a few known shapes its attention has. Sizes, biases,
softmax scale, RoPE tables, masks and windows are read from the model itself. docs/add-a-family.md walks through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mla_convert.core.errors import InputError

# Configuration values that every family relies on.
ALWAYS = {"is_causal": True, "is_encoder_decoder": False, "return_dict": True, "output_attentions": False}


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

    input_norm: str | None = "input_layernorm"
    """Name of the norm whose output the attention reads; None where it reads the residual stream itself."""

    output_norm: str | None = None
    """Name of a norm between the attention's output and the residual stream."""

    residual_multiplier: str | None = None
    """Name of the layer's factor on what attention adds to the residual stream."""

    final_norm: str = "norm"
    """Name of the norm after the last layer, beside the list of layers."""

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"

    fused: str | None = None
    """Name of one projection for query, key and value, which then replaces their three names."""

    fused_per_head: bool = False
    """Whether the rows of the fused projection are query, key, value of one head after another, not of all heads."""

    q_norm: str | None = None
    k_norm: str | None = None
    """Names of the norms of query and key, applied before RoPE; a layer that has none of that name does without."""

    norm_over: str = "head"
    """What such a norm is called with: "head" (B, T, heads, d_h), "all" (B, T, heads * d_h) or "heads first"
    (B, heads, T, d_h)."""

    rotary: bool = True
    """Whether it has RoPE at all."""

    partial_rotary: bool = False
    """Whether RoPE may turn the first dims of a head alone."""

    interleaved: bool = False
    """Whether RoPE turns neighbouring dims 2f and 2f + 1 of a head; otherwise f and f + half of the rotary dims."""

    table_step: int = 1
    """Columns of the cos and sin tables from one frequency to the next."""

    rope_layers: str | None = None
    """Configuration list that holds 0 for every layer without RoPE."""

    rope_layer_type: str | None = None
    """The only entry of `layer_types` whose layers have RoPE."""

    softcap: str | None = None
    """Configuration value at which attention's logits are capped by tanh."""

    sinks: str | None = None
    """Name of the attention's parameter with a logit per head that takes probability and adds no value."""

    renamed: tuple[tuple[str, str], ...] = ()
    """Parts of stored tensor names, and what transformers calls them in the model."""

    experts: tuple[str, str, str] | None = None
    """Names of gate, up and down projection of an expert where checkpoints store experts one by one."""

    requires: Mapping[str, Any] = field(default_factory=dict)
    """Configuration values that the conversion relies on."""

    tested: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Variants that the tests convert: name -> settings in which its tiny configuration differs from tests/pico.py's."""

    def entry(self, layer: Any) -> Any:
        """The norm that stands before a layer's attention; the identity where there is none."""
        return getattr(layer, self.input_norm) if self.input_norm else lambda hidden: hidden

    def exit(self, layer: Any) -> Any:
        """What turns the output of a layer's attention into what is added to the residual stream."""
        norm = getattr(layer, self.output_norm) if self.output_norm else lambda output: output
        factor = getattr(layer, self.residual_multiplier) if self.residual_multiplier else 1.0
        return norm if factor == 1.0 else lambda output: norm(output) * factor

    @property
    def projections(self) -> dict[str, str]:
        """Names of the projections that hold "q", "k", "v" and "o"."""
        names = (self.fused,) * 3 if self.fused else (self.query, self.key, self.value)
        return dict(zip("qkvo", (*names, self.output), strict=True))

    def check(self, config: Any, label: str) -> None:
        """Refuse a configuration whose attention is not of the kind that this family's has.

        Raises:
            InputError: names the setting.
        """
        for key, value in (ALWAYS | dict(self.requires)).items():
            found = getattr(config, key, value)
            if (found or None) != (value or None):
                raise InputError(f"{label} has {key} = {found}, which is not supported: it must be {value}")
