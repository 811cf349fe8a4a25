"""Attention backend of vLLM on latent caches: cache spec, metadata of a step, and the builder that makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from mla_convert.publish.engines.served import kernels
from mla_convert.publish.engines.served.prefill import Prefill, make_prefill

NAME = "MLA_CONVERT"
# Tokens of a page, unless the user chooses: a tile of the CUDA kernel lies within a page.
BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class LatentSpec(MLAAttentionSpec):
    """The cache of one layer: rows of a latent and a rotary key.

    vLLM 0.26 merges specs of MLA layers without a look at their widths, and gives every layer the first one's. Where this
    merge fails, vLLM gives each layer a tensor of its own width and all of them one block table.
    """

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """One spec for layers of one width.

        Raises:
            AssertionError: the widths differ; vLLM then keeps a spec for each layer.
        """
        assert len({spec.head_size for spec in specs}) == 1, "layers have latents of different widths"
        return super().merge(specs)


@dataclass
class LatentMetadata(AttentionMetadata):
    """A `Step` (served/layer.py) in vLLM.

    Attributes:
        num_actual_tokens: query tokens, those that pad a CUDA graph included.
    """

    num_actual_tokens: int
    num_decode_tokens: int
    decode_query_len: int
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    prefill: Prefill | None


class LatentBuilder(AttentionMetadataBuilder[LatentMetadata]):
    """Builds the metadata of a step from vLLM's."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    # The step built last, by the identity of vLLM's metadata: layers of different widths have builders of their own.
    _last: ClassVar[tuple[Any, LatentMetadata] | None] = None

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        """Arguments are those of every builder of vLLM."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size
        self.speculates = vllm_config.speculative_config is not None
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        layers = vllm_config.compilation_config.static_forward_context.values()
        shapes = frozenset(layer.shape for layer in layers if hasattr(layer, "latent_rotary"))
        # The dtype of queries: that of the cache is bytes where rows are quantised.
        kernels.compile_decodes(shapes, self.block_size, vllm_config.model_config.dtype, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> LatentMetadata:
        """Metadata of one step; the prefix that requests share is not treated apart."""
        last = LatentBuilder._last
        if last is not None and last[0] is common_attn_metadata and not fast_build:  # a draft model's changes in place
            return last[1]
        common = common_attn_metadata
        threshold = self.reorder_batch_threshold or 1
        # The decode kernel takes the same number of queries from every request.
        decodes, prefills, decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=threshold, require_uniform=threshold > 1
        )
        starts = common.query_start_loc_cpu
        query_len = int(starts[1] - starts[0]) if decodes else 1
        if decode_tokens % max(query_len, 1):
            raise RuntimeError(f"{decode_tokens} tokens of {decodes} requests that decode {query_len} each")
        found = LatentMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decode_tokens=decode_tokens,
            decode_query_len=max(query_len, 1),
            slot_mapping=common.slot_mapping,
            block_table=common.block_table_tensor,
            seq_lens=common.seq_lens,
            prefill=self._prefill(common, decodes, decode_tokens) if prefills else None,
        )
        LatentBuilder._last = (common, found)
        return found

    def _prefill(self, common: Any, decodes: int, decode_tokens: int) -> Prefill:
        """The requests after the first `decodes`."""
        starts = common.query_start_loc_cpu[decodes : common.num_reqs + 1]
        lens = common.seq_lens_cpu_upper_bound
        # With drafts, the host knows an upper bound only, and the causal mask needs the length.
        lens = common.seq_lens if lens is None or self.speculates else lens
        table = common.block_table_tensor[decodes:]

        def rows_of(request: Tensor, position: Tensor) -> Tensor:
            page = table[request, position // self.block_size].long()
            return page * self.block_size + position % self.block_size

        query_lens = (starts[1:] - starts[:-1]).tolist()
        return make_prefill(decode_tokens, query_lens, lens[decodes : common.num_reqs].tolist(), rows_of, self.device)


class LatentBackend(AttentionBackend):
    """The backend of the layers in `attention`, which call the kernels themselves."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """The name in vLLM's log."""
        return NAME

    @staticmethod
    def get_impl_cls() -> Any:
        """vLLM asks for it where a backend may lack a feature; the layer is its own implementation."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> Any:
        """The builder of this backend's metadata."""
        return LatentBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """(pages, tokens of a page, width)."""
        return (num_blocks, block_size, head_size)

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        """Pages that the kernels read."""
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Tokens of a page where the user gives none."""
        return BLOCK

    @classmethod
    def is_mla(cls) -> bool:
        """Yes."""
        return True
