"""A layer's latent attention in SGLang."""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import RowParallelLinear
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_parallel
from torch import Tensor, nn

from mla_convert.publish.engines.served.layer import LatentLayer, Place
from mla_convert.publish.engines.served.rotary import LatentRotary
from mla_convert.publish.engines.sglang_plugin.flash import flash_attention


class LatentAttention(LatentLayer):
    """Attention of a converted model, with SGLang's paged cache."""

    def __init__(
        self, config: Any, index: int, stock: nn.Module, softmax_scale: float, window: int | None, rotary: LatentRotary
    ) -> None:  # fmt: skip
        """Make a layer's attention; arguments are those of `LatentLayer`."""

        def output(width: int, hidden: int, bias: bool) -> nn.Module:
            return RowParallelLinear(width, hidden, bias=bias, prefix=f"{config.mla_layers}.{index}.o_proj")

        parallel = get_parallel()
        place = Place(parallel.tp_size, parallel.tp_rank, RMSNorm, output, "auto", flash_attention)
        super().__init__(config, index, stock, softmax_scale, window, rotary, place)

    def forward(self, positions: Tensor, hidden_states: Tensor, forward_batch: Any) -> Tensor:
        """Attention of the step's tokens (T, hidden); their RoPE tables are in `latent_rotary`."""
        query, compressed = self._project(hidden_states)
        latent, k_rope = compressed.split([self.cached_rank, self.cached_rope], dim=-1)
        output = query.new_empty(query.shape[0], self.num_heads * self.v_dim)
        if len(query):
            backend: Any = get_attn_backend()
            self.serve(query, latent, k_rope, backend.token_to_kv_pool.pages(self.index), backend.step, output)
        return self.o_proj(output)[0]
