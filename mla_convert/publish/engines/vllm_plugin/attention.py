"""A layer's latent attention in vLLM: its place among vLLM's attention layers, and the operator that calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import AttentionBackend

from mla_convert.publish.engines.served.layer import LatentLayer, Place
from mla_convert.publish.engines.served.prefill import PREFILL_TOKENS
from mla_convert.publish.engines.served.rotary import LatentRotary
from mla_convert.publish.engines.vllm_plugin.backend import LatentBackend, LatentMetadata, LatentSpec
from mla_convert.publish.engines.vllm_plugin.flash import flash_attention


class LatentAttention(LatentLayer, AttentionLayerBase):
    """Attention of a converted model, with vLLM's paged cache."""

    def __init__(
        self, config: Any, index: int, stock: nn.Module, name: str, softmax_scale: float, window: int | None,
        rotary: LatentRotary, vllm_config: Any, prefix: str,
    ) -> None:  # fmt: skip
        """Make a layer's attention.

        Args:
            config: the converted model's configuration.
            index: of the layer.
            stock: vLLM's attention, whose norms stay.
            name: of the layer among vLLM's attention layers.
            softmax_scale: multiplies the scores.
            window: tokens that a query sees; None for all.
            rotary: the tables of all layers.
            vllm_config: vLLM's.
            prefix: path of the attention in the model.
        """

        def output(width: int, hidden: int, bias: bool) -> nn.Module:
            return RowParallelLinear(width, hidden, bias=bias, quant_config=None, prefix=f"{prefix}.o_proj")

        place = Place(
            get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank(), RMSNorm, output,
            vllm_config.cache_config.cache_dtype, flash_attention,
        )  # fmt: skip
        super().__init__(config, index, stock, softmax_scale, window, rotary, place)
        self.layer_name, self.kv_cache_dtype = name, place.cache_dtype
        self.kv_cache = torch.tensor([])
        # vLLM allocates a cache for each layer in this table, and its operator finds the layer here.
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """The backend of every converted layer."""
        return LatentBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> LatentSpec:
        """The width of this layer's rows: numbers of the model's dtype, or bytes."""
        return LatentSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.shape.row,
            dtype=torch.uint8 if self.rows else vllm_config.model_config.dtype,
            cache_dtype_str="auto",
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Attention of the step's tokens (T, hidden); their RoPE tables are in `latent_rotary`."""
        query, compressed = self._project(hidden_states)
        latent, k_rope = compressed.split([self.cached_rank, self.cached_rope], dim=-1)
        output = query.new_empty(query.shape[0], self.num_heads * self.v_dim)
        # vLLM's operator for MLA: a graph is cut at it, and it calls forward_impl
        torch.ops.vllm.unified_mla_attention_with_output(
            query, latent, k_rope, output, _encode_layer_name(self.layer_name)
        )
        return self.o_proj(output)[0]

    def forward_impl(
        self, q: Tensor, k_c_normed: Tensor, k_pe: Tensor, kv_cache: Tensor, attn_metadata: LatentMetadata | None,
        output: Tensor, **_: Any,
    ) -> Tensor:  # fmt: skip
        """Rotate, cache and attend; the operator of vLLM calls it with these names.

        Args:
            q: (T, heads * (nope + p)).
            k_c_normed: (T, r), latents.
            k_pe: (T, p).
            kv_cache: (pages, page size, r + p).
            attn_metadata: of the step; None while vLLM measures memory.
            output: (T, heads * v), written.
        """
        if attn_metadata is None:
            self._occupy(q)
            return output.zero_()
        tokens = attn_metadata.num_actual_tokens
        self.serve(q[:tokens], k_c_normed[:tokens], k_pe[:tokens], kv_cache, attn_metadata, output[:tokens])
        return output

    def _occupy(self, like: Tensor) -> None:
        """Allocate what a prefill expands, for vLLM's measurement of memory, and free it."""
        width = self.qk_dim + self.v_dim
        like.new_empty(PREFILL_TOKENS, self.num_heads * width)
