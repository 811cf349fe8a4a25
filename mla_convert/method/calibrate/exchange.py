"""What one layer reads beside the hidden states, and what it hands over to later layers, as arguments of its modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mla_convert.method.calibrate.beside import Key, Layout, Part
from mla_convert.method.calibrate.layerwise import LayerKwargs, LayerwiseModel, first_output, fold, unfold
from mla_convert.modeling.attention_mla import shared_key
from mla_convert.source.shape import AttentionShape

# Tensors (B, heads, T, width) beside hidden states.
Tensors = dict[Key, tuple[Tensor, ...]]
SHARED = "shared_kv_states"


@dataclass(frozen=True)
class Exchange:
    """One layer's part in what is beside the hidden states.

    Attributes:
        index: of the layer.
        source: the layer whose keys and values, or latent, it attends to.
        kind: key under which stock attentions share keys and values: the type of the layer; None where none share.
        hands_over: keys and values, and latents, that later layers read of it.
        layout: of what the layers read that run together with it.
        streams: of hidden states, which are side by side in rows.
    """

    index: int = -1
    source: int = -1
    kind: str | int | None = None
    hands_over: tuple[Part, ...] = ()
    layout: Layout = field(default_factory=Layout)
    streams: int = 1

    @property
    def shares(self) -> bool:
        """Whether the layer attends to the keys and values, or the latent, of another one."""
        return self.source != self.index

    def for_attention(self, beside: Mapping[Key, tuple[Tensor, ...]]) -> dict[str, Any]:
        """Keyword arguments of the attention that depend on the windows, from what is beside them."""
        if self.kind is None:
            return {}
        names = {("keys", self.source): self.kind, ("latent", self.source): shared_key(self.source)}
        return {SHARED: {name: beside[key] for key, name in names.items() if key in beside}}

    def read(self, rows: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states, and `for_attention`, of rows of both."""
        hidden, beside = self.layout.take(rows)
        return hidden, self.for_attention(beside)

    def run(self, layer: nn.Module, kwargs: LayerKwargs, hidden: Tensor, beside: Tensors) -> Tensor:
        """Hidden states (B, T, hidden) behind the layer; what it hands over is added to `beside`."""
        own = self.for_attention(beside)
        if ("input", self.index) in beside:
            own["per_layer_input"] = beside["input", self.index][0].squeeze(1)
        output = first_output(layer(unfold(hidden, self.streams), **kwargs | own))
        self.take_over(own, beside)
        return fold(output, self.streams)

    def take_over(self, given: Mapping[str, Any], beside: Tensors) -> None:
        """Add to `beside` what an attention of the layer has put into its arguments."""
        names = {"keys": self.kind, "latent": shared_key(self.index)}
        for part in self.hands_over:
            if names[part.key[0]] in given[SHARED]:
                beside[part.key] = given[SHARED][names[part.key[0]]]

    def made(self, beside: Tensors) -> dict[Key, Tensor]:
        """Columns of what the layer hands over."""
        return {part.key: part.join(beside[part.key]) for part in self.hands_over if part.key in beside}

    def add_gradients(self, shared: dict[Key, Tensor], index: slice, gradient: Tensor, windows: int) -> None:
        """Add the gradients of what the layer reads of earlier ones to those of later layers.

        Args:
            shared: gradients (N, L, .) by key.
            index: of some windows.
            gradient: of rows of hidden states and what is beside them.
            windows: N.
        """
        start = self.layout.hidden_size or 0
        for part in self.layout.parts:
            columns = gradient[..., start : start + part.columns]
            start += part.columns
            if part.key[0] == "keys":
                if part.key not in shared:
                    shared[part.key] = torch.zeros(windows, *columns.shape[1:])
                shared[part.key][index] += columns.cpu()

    def run_and_keep(self, layer: nn.Module, kwargs: LayerKwargs, rows: Tensor) -> tuple[Tensor, dict[Key, Tensor]]:
        """Hidden states behind a layer, and the columns of what it hands over, from rows of both."""
        hidden, beside = self.layout.take(rows)
        return self.run(layer, kwargs, hidden, beside), self.made(beside)


# kv_lora_rank and qk_rope_head_dim of the latent that a converted layer makes.
Size = Callable[[int], tuple[int, int]]


def exchange_of(layerwise: LayerwiseModel, layer: int, size: Size | None = None) -> Exchange:
    """The exchange of one layer that runs alone; `size` is None where no layer is converted."""
    shape, shares = layerwise.source.shape, layerwise.source.family.shared
    source = shape.source_of(layer)
    kind = layerwise.source.config.layer_types[layer] if shares else None
    attention = getattr(layerwise.layers[layer], layerwise.source.family.attention, None)
    if hasattr(attention, "kv_shared_layer_index"):  # Gemma 3n in older transformers: by layer
        kind = source
    handed_over = _handed_over(shape, layer, size)
    return Exchange(layer, source, kind, handed_over, layout_of(layerwise, [layer], size), layerwise.streams)


def _handed_over(shape: AttentionShape, layer: int, size: Size | None) -> tuple[Part, ...]:
    if len(shape.readers_of(layer)) < 2:
        return ()
    own = shape.of(layer)
    keys = Part(("keys", layer), (own.head_dim, own.head_dim), own.num_kv_heads)
    return (keys,) if size is None else (keys, Part(("latent", layer), size(layer)))


def layout_of(layerwise: LayerwiseModel, group: Sequence[int], size: Size | None = None) -> Layout:
    """What consecutive layers that run together read beside the hidden states, and do not make themselves."""
    shape, width = layerwise.source.shape, layerwise.input_width
    sources = sorted({shape.source_of(layer) for layer in group})
    shared = [part for source in sources if source < group[0] for part in _handed_over(shape, source, size)]
    inputs = [Part(("input", layer), (width,)) for layer in group if width]
    # Latents come last, as the source's states have none.
    return Layout(shape.hidden_size * layerwise.streams, (*inputs, *sorted(shared, key=lambda part: part.key)))
