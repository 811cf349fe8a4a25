"""Attention backend of SGLang on latent caches: the metadata of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from torch import Tensor

from mla_convert.publish.engines.served import kernels
from mla_convert.publish.engines.served.layer import LatentLayer
from mla_convert.publish.engines.served.prefill import Prefill, make_prefill


@dataclass
class LatentStep:
    """A step, as every layer reads it (`served.layer.Step`). A step of SGLang has decodes or prompts, never both."""

    num_decode_tokens: int
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    prefill: Prefill | None = None
    decode_query_len: int = 1


class LatentBackend(AttentionBackend):
    """The backend of the layers in `attention`, which call the kernels themselves."""

    def __init__(self, runner: Any):
        """Take pools and sizes of SGLang's model runner, and compile the decode kernels of all layers."""
        super().__init__()
        self.req_to_token_pool, self.token_to_kv_pool = runner.req_to_token_pool, runner.token_to_kv_pool
        self.page, self.device = runner.token_to_kv_pool.page_size, torch.device(runner.device)
        self.step: LatentStep | None = None
        self.lens = self.table = torch.empty(0, dtype=torch.int32)
        shapes = frozenset(layer.shape for layer in runner.model.modules() if isinstance(layer, LatentLayer))
        kernels.compile_decodes(shapes, self.page, runner.dtype, self.device)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make the tensors that graphs read in every replay."""
        width = self.req_to_token_pool.req_to_token[:, :: self.page].shape[1]
        self.lens = torch.ones(max_bs, dtype=torch.int32, device=self.device)
        self.table = torch.zeros(max_bs, width, dtype=torch.int32, device=self.device)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Tokens of a request that only pads a graph."""
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Read a step's requests, before a graph and not in it: SGLang changes its table during a replay."""
        batch = forward_batch
        if batch.forward_mode.is_decode_or_idle():
            self.step = self._decodes(batch)
        elif batch.forward_mode.is_extend_without_speculative():
            self.step = self._prompts(batch)
        else:
            raise ValueError(f"converted model: the plugin has no {batch.forward_mode.name} steps")

    def _decodes(self, batch: Any) -> LatentStep:
        """A token of each request."""
        count = batch.batch_size
        # Tokens of a page lie side by side, so that the first one's place tells the page's.
        first = self.req_to_token_pool.req_to_token[batch.req_pool_indices, :: self.page]
        if count > len(self.lens):  # no graph is so large
            table, lens = (first // self.page).int(), batch.seq_lens.int()
        else:
            table, lens = self.table[:count], self.lens[:count]
            torch.div(first, self.page, rounding_mode="floor", out=table)
            lens.copy_(batch.seq_lens)
        return LatentStep(count, batch.out_cache_loc, table, lens)

    def _prompts(self, batch: Any) -> LatentStep:
        """Chunks of prompts; also a decode among them, which is a chunk of one token."""
        places = self.req_to_token_pool.req_to_token
        query_lens = list(batch.extend_seq_lens_cpu)
        key_lens = [before + new for before, new in zip(batch.extend_prefix_lens_cpu, query_lens, strict=True)]

        def rows_of(request: Tensor, position: Tensor) -> Tensor:
            return places[batch.req_pool_indices[request], position].long()

        prefill = make_prefill(0, query_lens, key_lens, rows_of, self.device)
        return LatentStep(0, batch.out_cache_loc, self.table, self.lens, prefill)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """No stock attention is left in a converted model."""
        raise NotImplementedError("a converted model's layers attend on latents themselves")
