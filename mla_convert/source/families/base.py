"""The description of a model family: where its attention is, and which of a few known forms it has.

A family is data only: names inside the stock transformers model. Sizes, biases, the softmax scale, RoPE tables, masks and
sliding windows are read from the model itself. docs/guides/add-a-family.md explains how to write one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mla_convert.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

# Configuration values that every family relies on.
ALWAYS = {"is_causal": True, "is_encoder_decoder": False, "return_dict": True, "output_attentions": False}


@dataclass(frozen=True)
class Family:
    """Names inside a transformers model of one family. Defaults are Llama's."""

    model_type: str
    """The `model_type` of its configuration."""

    checkpoints: str
    """Well-known checkpoints of this family, for messages and docs."""

    traits: str = ""
    """How its attention differs from Llama's, for docs."""

    layers: str = "model.layers"
    """Path of the list of decoder layers."""

    attention: str = "self_attn"
    """Name of the attention in a layer."""

    input_norm: str | None = "input_layernorm"
    """Name of the norm whose output the attention reads; None if the attention reads the residual stream itself."""

    output_norm: str | None = None
    """Name of a norm between the attention's output and the residual stream."""

    residual_multiplier: str | None = None
    """Name of the layer's factor on the attention's contribution to the residual stream."""

    input_multiplier: str | None = None
    """Name of the layer's factor on the attention's input."""

    attention_layers: tuple[str, ...] = ("full_attention", "sliding_attention")
    """Entries of `layer_types` whose layers have attention."""

    other_layers: tuple[str, ...] = ()
    """Entries of `layer_types` whose layers have none (recurrent layers, convolutions): they stay as they are."""

    state_mixer: str | None = None
    """Name of the module in a layer whose cached state does not grow with the context."""

    layer_outputs: int = 0
    """Number of entries in the tuple that a layer returns; 0: it returns hidden states alone."""

    final_norm: str = "norm"
    """Name of the norm after the last layer; it is a sibling of the list of layers."""

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"

    fused: str | None = None
    """Name of one projection for query, key and value, which then replaces their three names."""

    fused_per_head: bool = False
    """Whether the rows of the fused projection are query, key, value of one head after another, not of all heads."""

    gate: str | None = None
    """Name of the projection whose sigmoid multiplies the attention's output, before the output projection; the query
    projection itself where each head's rows are query, then gate."""

    key_multiplier: str | None = None
    """Name of the attention's factor on its keys."""

    q_norm: str | None = None
    k_norm: str | None = None
    """Names of the norms of query and key, applied before RoPE; a layer without a module of that name has no norm."""

    qk_norm_shape: str = "head"
    """Input shape of these norms: "head" (B, T, heads, d_h), "all" (B, T, heads * d_h) or "heads first"
    (B, heads, T, d_h)."""

    rotary: bool = True
    """Whether it may have RoPE; without, positions are learned."""

    partial_rotary: bool = False
    """Whether RoPE may rotate only the first dims of a head."""

    interleaved: bool = False
    """Whether RoPE rotates adjacent dims 2f and 2f + 1 of a head; otherwise f and f + half of the rotary dims."""

    freq_stride: int = 1
    """Columns of the cos and sin tables from one frequency to the next."""

    rope_layers: str | None = None
    """Configuration list that holds 0 for every layer without RoPE."""

    rope_layer_type: str | None = None
    """The only entry of `layer_types` whose layers have RoPE."""

    rope_layer_type_needs: str | None = None
    """Configuration value that `rope_layer_type` depends on: while it is None, all layers have RoPE."""

    softcap: str | None = None
    """Configuration value at which attention's logits are capped by tanh."""

    sinks: str | None = None
    """Name of the attention's parameter with one sink logit per head: it takes probability and adds no value."""

    renamed: tuple[tuple[str, str], ...] = ()
    """Pairs: a part of stored tensor names, and its replacement in the names of the model."""

    experts: tuple[str, ...] | None = None
    """Names of gate, up and down projection of an expert, or of up and down, if checkpoints store experts one by one."""

    joined: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Pairs of ends of names: a tensor of the model, and the stored tensors whose rows it holds one after another."""

    requires: Mapping[str, Any] = field(default_factory=dict)
    """Configuration values that the conversion relies on; a checkpoint with another value is refused."""

    tested: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Variants that the tests convert: name -> settings in which its tiny configuration differs from tests/pico.py's."""

    def entry(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """The norm before a layer's attention; the identity if there is none."""
        norm = getattr(layer, self.input_norm) if self.input_norm else lambda hidden: hidden
        factor = getattr(layer, self.input_multiplier) if self.input_multiplier else 1.0
        return norm if factor == 1.0 else lambda hidden: norm(hidden) * factor

    def exit(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """The map from the output of a layer's attention to its contribution to the residual stream."""
        norm = getattr(layer, self.output_norm) if self.output_norm else lambda output: output
        factor = getattr(layer, self.residual_multiplier) if self.residual_multiplier else 1.0
        return norm if factor == 1.0 else lambda output: norm(output) * factor

    @property
    def projections(self) -> dict[str, str]:
        """Names of the projections that hold "q", "k", "v" and "o"."""
        names = (self.fused,) * 3 if self.fused else (self.query, self.key, self.value)
        return dict(zip("qkvo", (*names, self.output), strict=True))

    def converted_layers(self, config: Any) -> tuple[int, ...] | None:
        """Indices of the layers that have attention, by the configuration; None if all have it."""
        if not self.other_layers:
            return None
        kinds = config.layer_types
        converted = tuple(index for index, kind in enumerate(kinds) if kind not in self.other_layers)
        return None if len(converted) == len(kinds) else converted

    def layers_with_rope(self, config: Any) -> tuple[bool, ...] | None:
        """Whether each layer has RoPE, by the configuration; None if all have it."""
        has_rope: tuple[bool, ...] = ()
        if self.rope_layers:
            has_rope = tuple(bool(flag) for flag in getattr(config, self.rope_layers))
        elif self.rope_layer_type and self._rope_depends_on_the_layer(config):
            has_rope = tuple(kind == self.rope_layer_type for kind in config.layer_types)
        return None if all(has_rope) else has_rope

    def _rope_depends_on_the_layer(self, config: Any) -> bool:
        return self.rope_layer_type_needs is None or getattr(config, self.rope_layer_type_needs) is not None

    def check(self, config: Any, label: str) -> None:
        """Refuse a configuration whose attention differs from the family's.

        Raises:
            InputError: names the setting.
        """
        for key, value in (ALWAYS | dict(self.requires)).items():
            configured = getattr(config, key, value)
            if (configured or None) != (value or None):
                raise InputError(f"{label} has {key} = {configured}, which is not supported: it must be {value}")
