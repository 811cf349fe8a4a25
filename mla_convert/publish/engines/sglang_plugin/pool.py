"""The cache in SGLang: rows of a latent and a rotary key, of another width in each layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from mla_convert.publish.engines.served.layer import cached_sizes
from mla_convert.publish.engines.sglang_plugin.options import is_converted


def widths(config: Any, layers: range) -> list[int]:
    """Numbers of a row in each of these layers."""
    return [sum(cached_sizes(config, index)) for index in layers]


def _layers(configurator: Any) -> range:
    return range(configurator.layer_info.start_layer, configurator.layer_info.end_layer)


def token_bytes(stock: Callable, sizes: Any, configurator: Any, num_layers: int) -> int:
    """Bytes that a token takes in all layers, around `DefaultPoolConfigurator._compute_cell_size`."""
    config = configurator.model_config.hf_config
    if not is_converted(config):
        return stock(sizes, configurator, num_layers)
    return sum(widths(config, _layers(configurator))) * configurator.kv_cache_dtype.itemsize


def build(stock: Callable, configurator: Any, **options: Any) -> Any:
    """The cache of a converted model, around `KVCacheConfigurator._build_token_to_kv_pool`."""
    config = configurator.model_config.hf_config
    if not is_converted(config):
        return stock(configurator, **options)
    from sglang.srt.runtime_context import get_exec

    layers = _layers(configurator)
    return pool_class()(
        widths(config, layers), options["sizes"].max_total_num_tokens, page_size=configurator.pool_page_size,
        dtype=configurator.kv_cache_dtype, device=configurator.device, start_layer=layers.start, end_layer=layers.stop,
        enable_memory_saver=get_exec().features.enable_memory_saver,
    )  # fmt: skip


def pool_class() -> type:
    """SGLang's pool of latents with a width for each layer; SGLang is imported here alone."""
    import torch
    from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    class LatentPool(MLATokenToKVPool):
        """A buffer (tokens, 1, width) for each layer, which the layer writes and reads itself, in pages."""

        def __init__(self, row_widths: list[int], size: int, **options: Any):
            """Allocate rows for `size` tokens; options are those of SGLang's pool."""
            self.row_widths = row_widths
            # The widest row stands for all where SGLang asks for one.
            super().__init__(
                size, kv_lora_rank=max(row_widths), qk_rope_head_dim=0, layer_num=len(row_widths), **options
            )

        def _create_buffers(self) -> None:
            memory = torch.cuda.use_mem_pool(self.custom_mem_pool) if self.custom_mem_pool else nullcontext()
            with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE), memory:
                # The first page takes what tokens write that only pad a batch.
                self.kv_buffer = [
                    torch.zeros(self.size + self.page_size, 1, width, dtype=self.store_dtype, device=self.device)
                    for width in self.row_widths
                ]

        def pages(self, layer: int) -> torch.Tensor:
            """Rows of a layer (pages, page size, width)."""
            buffer = self.get_key_buffer(layer)
            return buffer.view(-1, self.page_size, buffer.shape[-1])

        def set_kv_buffer(self, *_: Any, **__: Any) -> None:
            """No stock attention writes here."""
            raise NotImplementedError("a layer's rows of latents are written by its own attention")

        set_mla_kv_buffer = get_mla_kv_buffer = set_kv_buffer

    return LatentPool
