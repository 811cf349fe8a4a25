"""vLLM's own models with latent attention in every layer: `Mla<Base>` for each `<Base>` of the served families."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import vllm
from torch import Tensor, nn
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import PPMissingLayer

from mla_convert.modeling.configuration_mla import MODEL_TYPE, PREFIX
from mla_convert.publish.engines.vllm_plugin.attention import FP8, LatentAttention, cached_sizes
from mla_convert.publish.engines.vllm_plugin.entry import foreign_fields, refusal, serves
from mla_convert.publish.engines.vllm_plugin.rotary import LatentRotary, Reference
from mla_convert.publish.engines.vllm_plugin.weights import AttentionWeights

# Model types that tests/publish/test_vllm_plugin.py serves and compares with the converted model.
SERVED = (
    "llama", "mistral", "qwen2", "qwen3", "arcee", "cohere", "exaone4", "gemma", "gemma2", "glm", "glm4", "granite", "phi3",
    "seed_oss", "stablelm",
)  # fmt: skip

_classes: dict[str, type] = {}


class LatentModel(nn.Module):
    """Base of the served classes: builds vLLM's model, and puts latent attention in each layer."""

    config: Any
    supports_lora = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """Build the model.

        Args:
            vllm_config: vLLM's.
            prefix: path of this model in an outer one.

        Raises:
            ValueError: the model or the deployment has a property that this plugin does not serve.
        """
        config = vllm_config.model_config.hf_config
        check_deployment(config, vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        reference = Reference(config, vllm_config.model_config.max_model_len)
        planes = [cached_sizes(config, index)[1] // 2 for index in range(config.num_hidden_layers)]
        self.latent_rotary = LatentRotary(reference, config.model_type.removeprefix(MODEL_TYPE), planes)
        self.latent_layers: dict[int, str] = {}
        layers: Any = self.get_submodule(config.mla_layers)
        for index, layer in enumerate(layers):
            if not isinstance(layer, PPMissingLayer):
                self._replace(layer, index, reference, vllm_config)

    def _replace(self, layer: nn.Module, index: int, reference: Reference, vllm_config: Any) -> None:
        """Put latent attention in the place of a layer's attention, also among vLLM's attention layers."""
        config = vllm_config.model_config.hf_config
        stock = getattr(layer, config.mla_attention)
        known = vllm_config.compilation_config.static_forward_context
        inside = {id(module) for module in stock.modules()}
        name = next(name for name, module in known.items() if id(module) in inside)
        # The stock attention has registered itself; the new one takes its name.
        del known[name]
        path = f"{config.mla_layers}.{index}.{config.mla_attention}"
        attention = LatentAttention(
            config, index, stock, name, reference.softmax_scales[index], window_of(config, index), self.latent_rotary,
            vllm_config, path,
        )  # fmt: skip
        setattr(layer, config.mla_attention, attention)
        self.latent_layers[index] = path

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute all layers' RoPE tables, then the stock model."""
        self.latent_rotary.prepare(positions)
        return super().forward(input_ids, positions, *args, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a converted checkpoint: attentions here, all else as the stock model does.

        Raises:
            ValueError: a tensor of an attention is missing, unknown, or of another shape.
        """
        config = self.config
        pattern = re.compile(rf"{re.escape(config.mla_layers)}\.(\d+)\.{re.escape(config.mla_attention)}\.(.+)")
        attentions: dict[int, Any] = {index: self.get_submodule(path) for index, path in self.latent_layers.items()}
        loading = {index: AttentionWeights(attention) for index, attention in attentions.items()}

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                found = pattern.fullmatch(name)
                if not found:
                    yield name, tensor
                elif int(found[1]) in loading:
                    loading[int(found[1])].load(found[2], tensor)

        stock: Any = super()
        loaded = set(stock.load_weights(others()))
        columns: list[list[int]] = [[] for _ in range(config.num_hidden_layers)]
        for index, layer in loading.items():
            path = self.latent_layers[index]
            if layer.missing:
                raise ValueError(f"tensor {path}.{layer.missing[0]} is missing from the checkpoint")
            columns[index] = layer.columns
            loaded |= {f"{path}.{name}" for name, _ in layer.attention.named_parameters()}
        self.latent_rotary.place(columns)
        return loaded


def check_deployment(config: Any, vllm_config: Any) -> None:
    """Refuse what the plugin would serve wrongly.

    Raises:
        ValueError: with the reason and the remedy.
    """
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    kind = config.model_type.removeprefix(MODEL_TYPE)
    foreign = foreign_fields(config)
    reasons = [
        (not serves(vllm.__version__), refusal(vllm.__version__)),
        (
            kind not in SERVED,
            f"the plugin serves {', '.join(SERVED)}, not {kind}: use transformers, or `mla-convert export`",
        ),
        (foreign, f"its {', '.join(foreign)} in config.json is nothing that the plugin knows: use transformers"),
        (config.mla_sinks, "the plugin has no attention sinks: use transformers"),
        (
            cache.cache_dtype not in ("auto", dtype, *FP8),
            f"the plugin caches latents in {dtype} or fp8: leave out --kv-cache-dtype {cache.cache_dtype}",
        ),
        (
            config.latent_cache and cache.cache_dtype != "auto",
            f"its cache is quantised as {(config.latent_cache or {}).get('kind')}: leave out --kv-cache-dtype",
        ),
        (parallel.decode_context_parallel_size > 1, "the plugin has no decode context parallelism"),
        (parallel.prefill_context_parallel_size > 1, "the plugin has no prefill context parallelism"),
        (vllm_config.lora_config is not None, "the plugin serves no adapters: merge them before the conversion"),
        (
            config.num_attention_heads % parallel.tensor_parallel_size,
            f"{config.num_attention_heads} heads cannot be split over {parallel.tensor_parallel_size} devices",
        ),
        (
            config.mla_q_norm and config.mla_norm_over != "head",
            "the plugin has no norm over all heads together: use transformers",
        ),
    ]
    for applies, reason in reasons:
        if applies:
            raise ValueError(f"converted model: {reason}")


def window_of(config: Any, index: int) -> int | None:
    """Tokens that a query of a layer sees, as transformers masks them; None for all.

    vLLM's own attention is no source: it falls back to the model's window in layers that have none.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    windowed = kinds[index] == "sliding_attention" if kinds else getattr(config, "use_sliding_window", True)
    return window if window and windowed else None


def served_class(name: str) -> type:
    """The class `Mla<Base>` over vLLM's `<Base>`."""
    if name not in _classes:
        stock = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()
        _classes[name] = type(name, (LatentModel, stock), {"__module__": __name__, "__doc__": f"{name} of vLLM."})
    return _classes[name]


def __getattr__(name: str) -> type:
    """`Mla<Base>` for any `<Base>` of vLLM (PEP 562)."""
    if name.startswith(PREFIX) and name.removeprefix(PREFIX) in ModelRegistry.models:
        return served_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
