"""SGLang's settings for a converted model: what the plugin needs, and what it would serve wrongly."""

from __future__ import annotations

from typing import Any

from mla_convert.modeling.configuration_mla import MODEL_TYPE
from mla_convert.publish.engines.served.checks import refuse, unserved
from mla_convert.publish.engines.served.rotary import check_rope

# Name of the attention backend, and tokens of a page unless the user chooses: a tile of the CUDA kernel lies within a page.
BACKEND, PAGE = "mla_convert", 64
# Model types that tests/publish/test_sglang_plugin.py serves and compares with the converted model.
SERVED = ("llama", "mistral", "qwen2", "qwen3", "arcee", "cohere", "glm4", "granite", "phi3", "stablelm")
# Settings at which the plugin was not run, with the values that leave them out, and the option.
UNSERVED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("speculative_algorithm", (None,), "--speculative-algorithm"),
    ("enable_lora", (None, False), "--enable-lora"),
    ("lora_paths", (None, [], {}), "--lora-paths"),
    ("enable_dp_attention", (False,), "--enable-dp-attention"),
    ("pp_size", (1,), "--pp-size"),
    ("dcp_size", (1,), "--dcp-size"),
    ("attn_cp_size", (1,), "--attn-cp-size"),
    ("enable_prefill_cp", (False,), "--enable-prefill-cp"),
    ("disaggregation_mode", ("null",), "--disaggregation-mode"),
    ("enable_hierarchical_cache", (False,), "--enable-hierarchical-cache"),
    ("enable_hisparse", (False,), "--enable-hisparse"),
    ("enable_unified_memory", (False,), "--enable-unified-memory"),
    ("enable_page_major_kv_layout", (False,), "--enable-page-major-kv-layout"),
    ("enable_two_batch_overlap", (False,), "--enable-two-batch-overlap"),
    ("enable_pdmux", (False,), "--enable-pdmux"),
    ("enable_torch_compile", (False,), "--enable-torch-compile"),
    ("enable_deterministic_inference", (False,), "--enable-deterministic-inference"),
    ("cpu_offload_gb", (0,), "--cpu-offload-gb"),
    ("dllm_algorithm", (None,), "--dllm-algorithm"),
    ("is_embedding", (False,), "--is-embedding"),
)


def is_converted(config: Any) -> bool:
    """Whether a configuration is a converted model's."""
    return str(config.model_type).startswith(MODEL_TYPE)


def prepare(settings: Any, *_: Any, **__: Any) -> None:
    """Choose backend, page and graphs of a converted model, before SGLang resolves its own.

    Args:
        settings: SGLang's `ServerArgs`.

    Raises:
        ValueError: the model or a setting is one that the plugin does not serve.
    """
    model = settings.get_model_config()
    config = model.hf_config
    if not is_converted(config):
        return
    refuse([*unserved(config, SERVED, settings.tp_size), *_reasons(settings, config, str(model.dtype))])
    check_rope(config, model.context_len)
    settings.attention_backend = BACKEND
    settings.page_size = settings.page_size or PAGE
    # Prompts read as many cached rows as the batch has, which no graph of a prompt can hold.
    settings.cuda_graph_backend_prefill = "disabled"


def _reasons(settings: Any, config: Any, dtype: str) -> list[tuple[Any, str]]:
    """Settings that the plugin does not serve, for a model in this dtype."""
    other = {settings.attention_backend, settings.prefill_attention_backend, settings.decode_attention_backend}
    other -= {None, BACKEND}
    page, cache = settings.page_size, settings.kv_cache_dtype
    rows = (config.latent_cache or {}).get("kind")
    return [
        (other, f"its attention needs the plugin's backend: leave out --attention-backend {' '.join(sorted(other))}"),
        (page and page % 16, f"its kernels read pages of a multiple of 16 tokens: leave out --page-size {page}"),
        (
            cache != "auto" and (cache not in ("bfloat16", "bf16") or dtype != "torch.bfloat16"),
            f"the plugin caches latents in the model's dtype: leave out --kv-cache-dtype {cache}",
        ),
        (
            rows,
            f"its cache is quantised as {rows}, which the plugin does not serve: use vLLM's plugin, or transformers",
        ),
        (
            settings.cuda_graph_backend_prefill not in (None, "disabled"),
            "its prompts run without CUDA graphs: leave out --cuda-graph-backend-prefill",
        ),
        *(
            (getattr(settings, name, values[0]) not in values, f"the plugin was not run with it: leave out {option}")
            for name, values, option in UNSERVED
        ),
    ]
