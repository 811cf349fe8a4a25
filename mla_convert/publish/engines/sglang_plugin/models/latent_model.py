"""SGLang's own models with latent attention in every layer: `Mla<Base>` for each `<Base>` of its models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sglang
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.server_args import get_global_server_args
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mla_convert.modeling.configuration_mla import PREFIX
from mla_convert.publish.engines.served.checks import family, refuse, unserved, window_of
from mla_convert.publish.engines.served.layer import cached_sizes
from mla_convert.publish.engines.served.rotary import LatentRotary, Reference
from mla_convert.publish.engines.served.weights import load_attentions
from mla_convert.publish.engines.sglang_plugin.attention import LatentAttention
from mla_convert.publish.engines.sglang_plugin.backend import LatentBackend
from mla_convert.publish.engines.sglang_plugin.entry import refusal, serves
from mla_convert.publish.engines.sglang_plugin.options import BACKEND, SERVED
from mla_convert.source.families import FAMILIES, is_installed

register_attention_backend(BACKEND)(LatentBackend)


class LatentModel(nn.Module):
    """Base of the served classes: builds SGLang's model, and puts latent attention in each layer."""

    config: Any

    def __init__(self, config: Any, *args: Any, **options: Any) -> None:
        """Build the model.

        Args:
            config: the converted model's configuration.
            args: the stock model's.
            options: likewise.

        Raises:
            ValueError: the model or the deployment has a property that this plugin does not serve.
        """
        settings = get_global_server_args()
        refuse(
            [
                (not serves(sglang.__version__), refusal(sglang.__version__)),
                *unserved(config, SERVED, settings.tp_size),
                (
                    settings.attention_backend != BACKEND,
                    "SGLang chose its settings before it loaded the plugin: start it by `sglang serve`, or sglang.Engine",
                ),
            ]
        )
        super().__init__(config, *args, **options)
        reference = Reference(config, settings.context_length or config.max_position_embeddings)
        planes = [cached_sizes(config, index)[1] // 2 for index in range(config.num_hidden_layers)]
        self.latent_rotary = LatentRotary(reference, family(config), planes)
        layers: Any = self.get_submodule(config.mla_layers)
        for index, layer in enumerate(layers):
            stock, window = getattr(layer, config.mla_attention), window_of(config, index)
            scale = reference.softmax_scales[index]
            setattr(layer, config.mla_attention,
                    LatentAttention(config, index, stock, scale, window, self.latent_rotary))  # fmt: skip

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **options: Any) -> Any:
        """Compute all layers' RoPE tables, then the stock model."""
        self.latent_rotary.prepare(positions)
        return super().forward(input_ids, positions, *args, **options)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """Load a converted checkpoint: attentions here, all else as the stock model does.

        Raises:
            ValueError: a tensor of an attention is missing, unknown, or of another shape.
        """
        layers: Any = self.get_submodule(self.config.mla_layers)
        attentions = {index: getattr(layer, self.config.mla_attention) for index, layer in enumerate(layers)}
        stock: Any = super()
        columns, others = load_attentions(self.config, attentions, weights, stock.load_weights)
        self.latent_rotary.place(columns)
        return others


class UnknownModel(nn.Module):
    """Stands for a class whose original SGLang does not have."""

    def __init__(self, config: Any, *_: Any, **__: Any) -> None:
        """Refuse the model.

        Raises:
            ValueError: always.
        """
        refuse(unserved(config, SERVED, 1))
        raise ValueError(f"converted model: SGLang has no class for its original, {family(config)}")


def _classes() -> list[type]:
    """The class of every family, once."""
    bases = dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind] for kind in filter(is_installed, FAMILIES))
    found = []
    for name in bases:
        stock = ModelRegistry.models.get(name)
        parents = (LatentModel, stock) if isinstance(stock, type) else (UnknownModel,)
        members = {"__module__": __name__, "__doc__": f"{PREFIX}{name} of SGLang."}
        found.append(type(PREFIX + name, parents, members))
    return found


EntryClass = _classes()
