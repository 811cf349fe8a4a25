"""The description of a model family: where its attention is, and which of a few known forms it has.

A family is data only: names inside the stock transformers model. Sizes, biases, the softmax scale, RoPE tables, masks and
sliding windows are read from the model itself. docs/guides/add-a-family.md explains how to write one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from mla_convert.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

# Configuration values that every family relies on.
ALWAYS = {"is_causal": True, "is_encoder_decoder": False, "return_dict": True, "output_attentions": False}


@dataclass(frozen=True)
class QueryGrowth:
    """Queries that grow with their position p, by 1 + b log(1 + floor((p + first) / l)) (arXiv 2501.19399)."""

    slope: str
    """Configuration value b, or entry of its RoPE parameters; without it, queries do not grow."""

    scale: str
    """Configuration value l, or entry of its RoPE parameters."""

    first: int = 0

    switch: str | None = None
    """Configuration value that must be true."""

    without_rope: bool = False
    """Whether only layers without RoPE have it."""


@dataclass(frozen=True)
class Family:
    """Names inside a transformers model of one family. Defaults are Llama's."""

    model_type: str
    """The `model_type` of its configuration."""

    checkpoints: str
    """Well-known checkpoints of this family, for messages and docs."""

    needs: str = ""
    """Oldest transformers in which its stock model works, if not every one that has the type does."""

    traits: str = ""
    """How its attention differs from Llama's, for docs."""

    layers: str = "model.layers"
    """Path of the list of decoder layers."""

    attention: str = "self_attn"
    """Name of the attention in a layer."""

    input_norm: str | tuple[str, ...] | None = "input_layernorm"
    """Name of the norm whose output the attention reads, or its names, of which a layer has one; None if the attention reads
    the residual stream itself."""

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

    shared: str | None = None
    """Configuration value: how many of the last layers have no keys and values, and attend to those of the last layer before
    them of their own type."""

    layer_inputs: str | None = None
    """Configuration value: width of an input that each layer gets for each token, beside the hidden states; 0: none."""

    streams: str | None = None
    """Configuration value: number of streams of hidden states (streams, B, T, d) between layers, which a layer's module
    `altup` mixes (AltUp, arXiv 2301.13310). Attention reads the first stream. Steps here have them as (B, T, streams * d)."""

    final_norm: str = "norm"
    """Name of the norm after the last layer; it is a sibling of the list of layers."""

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"

    fused: str | None = None
    """Name of one projection for query, key and value, which then replaces their three names."""

    fused_rows: str = "query, key, value"
    """Order of the fused projection's rows: "query, key, value" of all heads; "groups": for each KV head, the queries that
    read it, its key and its value; "shards": in each of four equal parts, query, value and key (CodeGen)."""

    gate: str | None = None
    """Name of the projection whose sigmoid multiplies the attention's output, before the output projection; the query
    projection itself where each head's rows are query, then gate."""

    key_multiplier: str | None = None
    """Name of the attention's factor on its keys."""

    q_norm: str | None = None
    k_norm: str | None = None
    """Names of the norms of query and key, applied before RoPE; a layer without a module of that name has no norm."""

    v_norm: str | None = None
    """Name of the norm of values, an RMSNorm of each head without weights."""

    heads_by_layer: bool = False
    """Whether layers may differ in KV heads and head width, by the configuration's `per_layer_config`. Their RoPE pairs dims
    f and f + half of the head; its type "proportional" leaves the pairs of the highest f still."""

    one_projection: str | None = None
    """Configuration value: while it is true, full-attention layers have no value projection, and their values are the output
    of the key projection, before the norm of keys."""

    norm_after_rope: bool = False
    """Whether these norms are applied after RoPE, which commutes with a root mean square; a weight for each dim is applied to
    rotated queries. The norm of queries and keys must be an RMSNorm over a head."""

    qk_norm_shape: str = "head"
    """Input shape of these norms: "head" (B, T, heads, d_h), "all" (B, T, heads * d_h) or "heads first"
    (B, heads, T, d_h)."""

    rotary: bool = True
    """Whether it may have RoPE; without, positions are learned."""

    partial_rotary: bool = False
    """Whether RoPE may rotate only the first dims of a head."""

    interleaved: bool = False
    """Whether RoPE rotates adjacent dims 2f and 2f + 1 of a head; otherwise f and f + half of the rotary dims."""

    backwards: bool = False
    """Whether RoPE turns by the negative angle."""

    rope_tables: str = "cos, sin"
    """The `position_embeddings` of its layers: "cos, sin", "sin, cos", or "complex" for one tensor of cos + i sin."""

    freq_stride: int = 1
    """Columns of the cos and sin tables from one frequency to the next."""

    rope_layers: str | None = None
    """Configuration list that holds 0 for every layer without RoPE."""

    rope_layer_type: str | None = None
    """The only entry of `layer_types` whose layers have RoPE."""

    rope_layer_type_needs: str | None = None
    """Configuration value that `rope_layer_type` depends on: while it is None, all layers have RoPE."""

    rope_in_dense_layers: str | None = None
    """Configuration value: while it is 1, layers with a dense MLP (by `mlp_layer_types`) have RoPE whatever their type."""

    query_growth: QueryGrowth | None = None
    """Growth of the queries with their position."""

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
    """Configuration values that the conversion relies on; a checkpoint with another value is refused. A tuple: any of them."""

    tested: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Variants that the tests convert: name -> settings in which its tiny configuration differs from tests/pico.py's."""

    def entry(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """The norm before a layer's attention; the identity if there is none."""
        names = (self.input_norm,) if isinstance(self.input_norm, str) else self.input_norm or ()
        norm = next((getattr(layer, name) for name in names if hasattr(layer, name)), lambda hidden: hidden)
        if self.streams:
            return lambda hidden: norm(self.residual(layer)(hidden))
        factor = getattr(layer, self.input_multiplier) if self.input_multiplier else 1.0
        return norm if factor == 1.0 else lambda hidden: norm(hidden) * factor

    def residual(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """The map from a layer's hidden states to the residual stream (B, T, d) that its attention reads and adds to."""
        if not self.streams:
            return lambda hidden: hidden
        count, mixer = getattr(layer.config, self.streams), cast(Any, layer.altup)
        return lambda hidden: mixer.predict(hidden.unflatten(-1, (count, -1)).movedim(-2, 0))[0]

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

    def latent_of(self, config: Any) -> tuple[int, ...] | None:
        """The layer whose keys and values each layer attends to; None if each has its own."""
        count = getattr(config, self.shared) if self.shared else 0
        if not count:
            return None
        own = config.num_hidden_layers - count
        last = {kind: index for index, kind in enumerate(config.layer_types[:own])}
        return (*range(own), *(last[kind] for kind in config.layer_types[own:]))

    def layers_with_rope(self, config: Any) -> tuple[bool, ...] | None:
        """Whether each layer has RoPE, by the configuration; None if all have it."""
        if self.rope_layers:
            has_rope = tuple(bool(flag) for flag in getattr(config, self.rope_layers))
        elif self.rope_layer_type and self._rope_depends_on_the_layer(config):
            has_rope = tuple(kind == self.rope_layer_type for kind in config.layer_types)
            if self.rope_in_dense_layers and getattr(config, self.rope_in_dense_layers) == 1:
                has_rope = tuple(a or b == "dense" for a, b in zip(has_rope, config.mlp_layer_types, strict=True))
        else:  # a type of layers whose RoPE parameters are stated to be none has no RoPE
            parameters, kinds = (
                getattr(config, "rope_parameters", None) or {},
                getattr(config, "layer_types", None) or (),
            )
            # A type that is not mentioned has RoPE: only a stated None means none.
            has_rope = tuple(parameters.get(kind, "") is not None for kind in kinds)
        return None if all(has_rope) else has_rope

    def growth_of_queries(self, config: Any) -> list[list[float] | None] | None:
        """Each layer's b, l and first of `query_growth`; None if no layer has it."""
        growth, values = self.query_growth, {**config.to_dict(), **(getattr(config, "rope_parameters", None) or {})}
        if growth is None or not values.get(growth.slope) or (growth.switch and not values[growth.switch]):
            return None
        entry = [float(values[growth.slope]), float(values[growth.scale]), float(growth.first)]
        rope = self.layers_with_rope(config) or (True,) * config.num_hidden_layers
        return [None if growth.without_rope and has_rope else entry for has_rope in rope]

    def _rope_depends_on_the_layer(self, config: Any) -> bool:
        return self.rope_layer_type_needs is None or getattr(config, self.rope_layer_type_needs) is not None

    def check(self, config: Any, label: str) -> None:
        """Refuse a configuration whose attention differs from the family's.

        Raises:
            InputError: names the setting.
        """
        for key, value in (ALWAYS | dict(self.requires)).items():
            allowed = value if isinstance(value, tuple) else (value,)
            configured = getattr(config, key, allowed[0])
            # None, 0 and False all say that a feature is off.
            if (configured or None) not in [each or None for each in allowed]:
                words = " or ".join(map(str, allowed))
                raise InputError(f"{label} has {key} = {configured}, which is not supported: it must be {words}")
