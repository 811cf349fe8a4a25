"""A transformers model whose attention is Multi-head Latent Attention (MLA).

`Mla<Base>` is the stock causal language model `<Base>` with every attention replaced by `MlaAttention`; embeddings, norms,
MLPs and heads are the stock classes with the original's weights.

This file and those beside it need only torch and transformers; they are also written beside the weights of a converted
model, so that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works anywhere.
"""

import contextlib
import importlib
import inspect
from collections.abc import Iterator

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from .attention_mla import MlaAttention
from .configuration_mla import MODEL_TYPE, PREFIX, config_class, is_whole, warn_if_untried
from .stock_mla import CACHE_NAMES, cache_names

_classes: dict[str, type] = {}


def attention_class(base: type) -> type:
    """A subclass of MlaAttention and of the stock attention class, as the library's output capturing expects.

    Raises:
        TypeError: the stock attention of the installed transformers takes no cache by a known name.
    """
    names, caches = tuple(inspect.signature(base.forward).parameters)[1:], cache_names(base)
    if not caches:
        raise TypeError(
            f"{base.__name__} of transformers {transformers.__version__} takes {', '.join(names)}: none of these is a cache "
            f"that this code knows; `mla-convert refresh` may have newer code"
        )
    fields = {"__module__": __name__, "stock_arguments": names, "cache_names": caches | set(CACHE_NAMES)}
    return type(PREFIX + base.__name__, (MlaAttention, base), fields)


def install(model: PreTrainedModel) -> None:
    """Replace every attention of a stock model's language model (built from an Mla configuration) by MLA."""
    config = model.config.get_text_config()
    warn_if_untried(config)
    layers = model.get_submodule(config.mla_layers)
    for layer_idx in config.converted_layers():
        layer = layers[layer_idx]
        stock = getattr(layer, config.mla_attention)
        setattr(layer, config.mla_attention, attention_class(type(stock))(config, layer_idx, stock))


# Methods that start transformers' continuous batching.
CONTINUOUS = ("init_continuous_batching", "continuous_batching_context_manager", "generate_batch")


def no_continuous_batching(self: PreTrainedModel, *_, **__) -> None:
    """Refuse continuous batching, which pages keys and values of every head.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        f"{type(self).__name__} caches latents, and transformers' continuous batching pages keys and values of every head: "
        f"use generate() with padded prompts, or `mla-convert export` for vLLM or SGLang"
    )


@contextlib.contextmanager
def read_as_stock(config: PreTrainedConfig) -> Iterator[None]:
    """The language model's configuration in a multimodal one with its stock class, by which the parts are built."""
    text = config.get_text_config()
    converted = type(text)
    if text is not config:
        # By its model type, as transformers may have imported the files of a folder twice, and so has two `MlaFields`.
        stock = (base for base in converted.__mro__ if hasattr(base, "model_type"))
        text.__class__ = next(base for base in stock if not base.model_type.startswith(MODEL_TYPE))
    try:
        yield
    finally:
        text.__class__ = converted


def model_class(base: type) -> type:
    """The converted counterpart of a stock causal language model, or of a multimodal model that contains one."""
    name = PREFIX + base.__name__
    if name not in _classes:

        def __init__(self: PreTrainedModel, config: PreTrainedConfig) -> None:  # noqa: N807
            if config.mla_softcap is not None or config.mla_sinks:
                self._supports_sdpa = False  # SDPA has neither; not every version of the stock classes declares it
            with read_as_stock(config):
                base.__init__(self, config)
            install(self)
            self.post_init()

        made = type(
            name,
            (base,),
            {
                "__init__": __init__,
                "__module__": __name__,
                "__doc__": f"{base.__name__} with Multi-head Latent Attention.",
                "config_class": config_class(base.config_class),
                # Both need keys and values of equal width; MLA's differ.
                "_supports_flash_attn": False,
                "_supports_flex_attn": False,
                "_tp_plan": {},
                "_auto_class": "AutoModelForImageTextToText" if is_whole(base.config_class) else "AutoModelForCausalLM",
                # As in a stock model, buffers that are in no checkpoint are initialised (Falcon-H1 has such).
                "is_custom_code": classmethod(lambda cls: False),
                **dict.fromkeys(CONTINUOUS, no_continuous_batching),
            },
        )
        return _classes.setdefault(name, made)  # another thread may have made it meanwhile
    return _classes[name]


def __getattr__(name: str) -> type:
    """`Mla<Base>` for any generating model `<Base>` of transformers, and its configuration (PEP 562)."""
    if name.startswith(PREFIX) and name.endswith("Config"):
        return getattr(importlib.import_module(".configuration_mla", __package__), name)
    if name.startswith(PREFIX) and name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return model_class(getattr(transformers, name[len(PREFIX) :]))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
