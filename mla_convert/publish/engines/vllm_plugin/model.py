"""vLLM's own models with latent attention in every layer: `Mla<Base>` for each `<Base>` of the served families."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import vllm
from torch import Tensor, nn
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import PPMissingLayer

from mla_convert.modeling.configuration_mla import PREFIX
from mla_convert.publish.engines.served.checks import family, refuse, unserved, window_of
from mla_convert.publish.engines.served.layer import FP8, cached_sizes
from mla_convert.publish.engines.served.rotary import LatentRotary, Reference
from mla_convert.publish.engines.served.weights import load_attentions
from mla_convert.publish.engines.vllm_plugin.attention import LatentAttention
from mla_convert.publish.engines.vllm_plugin.entry import refusal, serves

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
        self.latent_rotary = LatentRotary(reference, family(config), planes)
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
        attentions: dict[int, Any] = {index: self.get_submodule(path) for index, path in self.latent_layers.items()}
        stock: Any = super()
        columns, others = load_attentions(self.config, attentions, weights, stock.load_weights)
        self.latent_rotary.place(columns)
        own = {
            f"{self.latent_layers[i]}.{name}" for i, layer in attentions.items() for name, _ in layer.named_parameters()
        }
        return own | set(others)


def check_deployment(config: Any, vllm_config: Any) -> None:
    """Refuse what the plugin would serve wrongly.

    Raises:
        ValueError: with the reason and the remedy.
    """
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    refuse(
        [
            (not serves(vllm.__version__), refusal(vllm.__version__)),
            *unserved(config, SERVED, parallel.tensor_parallel_size),
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
        ]
    )


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
