"""Weights of a converted checkpoint in the form of `LatentLayer`: fused, padded, and of this device's heads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def _unchanged(rows: Tensor) -> Tensor:
    return rows


def _into(target: Tensor, change: Callable[[Tensor], Tensor] = _unchanged) -> Callable[[Tensor], None]:
    """A function that copies a tensor, changed, to its place."""

    def place(tensor: Tensor) -> None:
        target.copy_(change(tensor.to(target.device)))

    return place


class AttentionWeights:
    """Loads one layer's tensors, each once, and knows which are missing."""

    def __init__(self, attention: Any):
        """Plan the places of the tensors of a `LatentLayer`."""
        self.attention = attention
        self.columns: list[int] = []
        self.places: dict[str, tuple[tuple[int, ...], Callable[[Tensor], None]]] = {}
        self._plan()

    @property
    def missing(self) -> list[str]:
        """Tensors that have not been loaded."""
        return sorted(self.places)

    @torch.no_grad()
    def load(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor to its place.

        Args:
            name: inside the attention.
            tensor: as the checkpoint stores it.

        Raises:
            ValueError: the attention has no such tensor, has it already, or has another shape.
        """
        label = f"{self.attention.layer_name}: tensor {name}"
        if name not in self.places:
            raise ValueError(f"{label} has no place in the converted attention, or is there twice")
        # Taken out, so that a second tensor of that name is refused and the rest are those that are missing.
        shape, place = self.places.pop(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{label} has shape {tuple(tensor.shape)}, expected {shape}")
        place(tensor)

    def _plan(self) -> None:
        a = self.attention
        loader, bias = a.o_proj.weight.weight_loader, a.o_proj.bias
        self._add("kv_b_proj.weight", (a.total_heads * (a.nope_dim + a.v_dim), a.rank), self._split_up)
        self._add("rope_freq_index", (a.rope_dim // 2,), lambda index: self.columns.extend(index.tolist()))
        shape = (a.fused.shape[1], a.total_heads * a.v_dim)
        self._add("o_proj.weight", shape, lambda tensor: loader(a.o_proj.weight, tensor))
        if bias is not None:
            self._add("o_proj.bias", (shape[0],), _into(bias))
        (self._plan_normed if a.normed else self._plan_projections)()

    def _plan_projections(self) -> None:
        """Queries and compressed rows from hidden states."""
        a = self.attention
        queries, width = a.total_heads * (a.nope_dim + a.rope_dim), a.rank + a.rope_dim
        self._add_linear("q_proj", queries, 0, a.query_width, self._own_queries, a.q_bias)
        self._add_linear("kv_a_proj_with_mqa", width, a.query_width, a.rest_width, self._pad_compressed, a.kv_bias)

    def _plan_normed(self) -> None:
        """The original's projections and norms, and the maps of normed queries and keys."""
        a = self.attention
        keys, start = a.kv_heads * a.v_dim, a.query_width
        self._add_linear(
            "q_proj", a.total_heads * a.v_dim, 0, start, lambda rows: self._own(rows).flatten(0, 1), a.q_bias
        )
        self._add_linear("k_proj", keys, start, keys, _unchanged, a.kv_bias)
        self._add_linear("v_proj", keys, start + keys, keys, _unchanged, a.kv_bias)
        maps = (a.total_heads * (a.nope_dim + a.rope_dim), a.v_dim)
        self._add("q_b_proj.weight", maps, _into(a.query_map, lambda rows: self._pad_query(self._own(rows))))
        self._add("kv_a_proj_with_mqa.weight", (a.rank + a.rope_dim, 2 * keys), _into(a.compress, self._pad_compressed))
        for name, norm in zip(a.norm_names, (a.q_norm, a.k_norm), strict=True):
            for part, weight in norm.named_parameters():
                self._add(f"{name}.{part}", tuple(weight.shape), _into(weight))

    def _add_linear(
        self, name: str, rows: int, start: int, length: int, change: Callable[[Tensor], Tensor], biased: bool
    ) -> None:
        """A projection of `rows` rows, which become `length` rows of the fused one."""
        a = self.attention
        self._add(f"{name}.weight", (rows, a.fused.shape[1]), _into(a.fused.narrow(0, start, length), change))
        if biased:
            self._add(f"{name}.bias", (rows,), _into(a.fused_bias.narrow(0, start, length), change))

    def _add(self, name: str, shape: tuple[int, ...], place: Callable[[Tensor], None]) -> None:
        self.places[name] = shape, place

    def _split_up(self, tensor: Tensor) -> None:
        a = self.attention
        key, value = self._own(tensor).to(a.up_key.device).split([a.nope_dim, a.v_dim], dim=1)
        a.up_key[..., : a.rank] = key
        a.up_value[..., : a.rank].copy_(value)

    def _own(self, rows: Tensor) -> Tensor:
        """Rows of all heads (H * d, ...) as those of this device's heads (heads, d, ...)."""
        a = self.attention
        return rows.unflatten(0, (a.total_heads, -1))[a.first_head : a.first_head + a.num_heads]

    def _own_queries(self, rows: Tensor) -> Tensor:
        return self._pad_query(self._own(rows)).flatten(0, 1)

    def _pad_query(self, rows: Tensor) -> Tensor:
        """Rows (H, nope + 2m, ...) with as many rotary planes as are cached."""
        a = self.attention
        content, planes = rows.split([a.nope_dim, a.rope_dim], dim=1)
        return torch.cat([content, self._pad_planes(planes, 1)], dim=1)

    def _pad_compressed(self, rows: Tensor) -> Tensor:
        """Rows (r + 2m, ...) with the rank and the planes that are cached."""
        a = self.attention
        latent, planes = rows.split([a.rank, a.rope_dim])
        more = latent.new_zeros(a.cached_rank - a.rank, *latent.shape[1:])
        return torch.cat([latent, more, self._pad_planes(planes, 0)])

    def _pad_planes(self, planes: Tensor, dim: int) -> Tensor:
        """Real parts, then imaginary ones, each padded with zeros."""
        a = self.attention
        shape = list(planes.shape)
        shape[dim] = (a.cached_rope - a.rope_dim) // 2
        more = planes.new_zeros(shape)
        real, imaginary = planes.chunk(2, dim=dim)
        return torch.cat([real, more, imaginary, more], dim=dim)


def load_attentions(
    config: Any, attentions: Mapping[int, Any], weights: Iterable[tuple[str, Tensor]],
    load_others: Callable[[Iterator[tuple[str, Tensor]]], Any],
) -> tuple[list[list[int]], Any]:  # fmt: skip
    """Load a converted checkpoint: attentions here, all else as the engine does.

    Args:
        config: the converted model's configuration.
        attentions: the `LatentLayer` of each layer that this process has.
        weights: of the checkpoint.
        load_others: the stock model's `load_weights`.

    Returns:
        For each layer, columns of the original's RoPE table, and what `load_others` returned.

    Raises:
        ValueError: a tensor of an attention is missing, unknown, or of another shape.
    """
    pattern = re.compile(rf"{re.escape(config.mla_layers)}\.(\d+)\.{re.escape(config.mla_attention)}\.(.+)")
    loading = {index: AttentionWeights(attention) for index, attention in attentions.items()}

    def others() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            found = pattern.fullmatch(name)
            if not found:
                yield name, tensor
            elif int(found[1]) in loading:
                loading[int(found[1])].load(found[2], tensor)

    loaded = load_others(others())
    columns: list[list[int]] = [[] for _ in range(config.num_hidden_layers)]
    for index, layer in loading.items():
        if layer.missing:
            path = f"{config.mla_layers}.{index}.{config.mla_attention}"
            raise ValueError(f"tensor {path}.{layer.missing[0]} is missing from the checkpoint")
        columns[index] = layer.columns
    return columns, loaded
