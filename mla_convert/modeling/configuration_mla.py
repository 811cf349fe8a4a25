"""Configuration of a model converted to Multi-head Latent Attention (MLA).

`Mla<Base>Config` exists for every transformers configuration `<Base>Config`: the original's fields plus the ones below.
Fields have DeepSeek-V2's names (arXiv 2405.04434) where the object is the same. This file needs only transformers; it is
also written beside the weights of a converted model.
"""

import os
import warnings

import transformers
from packaging.version import Version
from transformers import PreTrainedConfig

PREFIX, MODEL_TYPE = "Mla", "mla_"
# These plans of the stock classes name projections that a converted model does not have.
PARALLEL_PLANS = ("base_model_tp_plan", "base_model_fsdp_plan")
KERNELS = ("auto", "kernels", "sdpa")

_classes: dict[str, type] = {}


class MlaFields:
    """Fields that a converted model's configuration adds to the original's."""

    # Numbers cached per token: kv_lora_rank of the latent and qk_rope_head_dim of the rotary key, both shared by all heads.
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    # Per head: width of the query and key part without position, and of the value.
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    # Width of the query-key product; transformers' generate reads it to leave the static cache's shape to the first update.
    qk_head_dim: int = 192
    # One entry per layer where layers differ (0 for a layer without attention); the fields in the singular then hold the
    # largest.
    kv_lora_ranks: list[int] | None = None
    qk_rope_head_dims: list[int] | None = None
    qk_nope_head_dims: list[int] | None = None
    v_head_dims: list[int] | None = None
    # The original's KV heads by layer, where layers differ.
    mla_kv_heads: list[int] | None = None
    # Which projections carry a bias (they do where the original's do).
    mla_q_bias: bool = False
    mla_kv_bias: bool = False
    mla_o_bias: bool = False
    # Where the stock model has its attention: path of the list of layers, and the name inside a layer.
    mla_layers: str = "model.layers"
    mla_attention: str = "self_attn"
    # Indices of the layers with attention, if not all have it; the others are the original's.
    mla_converted_layers: list[int] | None = None
    # The layer whose latent each layer attends to, where some attend to another's: they cache nothing.
    mla_latent_of: list[int] | None = None
    # Name of the projection whose sigmoid multiplies the attention's output; "q_proj": the second half of each head's rows.
    mla_gate: str | None = None
    # Names of the stock attention's norms of query and key, and the shape that they take (`apply_norm`).
    mla_q_norm: str | None = None
    mla_k_norm: str | None = None
    mla_norm_over: str = "head"
    # Name of the stock attention's norm of values; indices of the layers whose values are the output of the key projection,
    # in which normed keys are a linear map of normed values.
    mla_v_norm: str | None = None
    mla_one_projection: list[int] | None = None
    # Whether rotated queries are multiplied by a weight for each dim: those of norms that the original applies after RoPE.
    mla_rope_weights: bool = False
    # Form of the stock model's RoPE tables (`rope_tables`), and each layer's growth of queries with their position
    # (`query_growth`), if one has it.
    mla_rope_tables: str = "cos, sin"
    mla_query_growth: list[list[float] | None] | None = None
    # Cap of the attention logits; name of the stock attention's parameter with the sinks' logits.
    mla_softcap: float | None = None
    mla_sinks: str | None = None
    # Attention while decoding: "kernels" (the kernels of mla_attention, or an error), "sdpa" (the library's attention), or
    # "auto" (the kernels where they can serve, else the library's). The variable MLA_CONVERT_KERNEL overrides it.
    mla_kernel: str = "auto"
    # Format of the cached rows (quantised_latent_mla.py): version, kind, group, rope, and for "mixed" wide by layer; None
    # caches numbers of the model's dtype.
    latent_cache: dict | None = None
    # Version of the checkpoint format, and of the newest transformers that the code beside the weights was tried with.
    mla_format: int = 1
    mla_transformers: str | None = None

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: the fields are a stock class's. transformers 5.17 renames the layer types of all other classes."""
        return False

    def converted_layers(self) -> list[int]:
        """Indices of the layers with latent attention."""
        layers = range(self.num_hidden_layers)
        return [index for index in layers if self.mla_converted_layers is None or index in self.mla_converted_layers]

    def caching_layers(self) -> list[int]:
        """Indices of the layers that cache a latent."""
        return [index for index in self.converted_layers() if self.source_of(index) == index]

    def source_of(self, layer_idx: int) -> int:
        """The layer whose latent a layer attends to."""
        return self.mla_latent_of[layer_idx] if self.mla_latent_of else layer_idx

    def layer_rank(self, layer_idx: int) -> int:
        """kv_lora_rank of one layer."""
        return self.kv_lora_ranks[layer_idx] if self.kv_lora_ranks else self.kv_lora_rank

    def layer_rope_dim(self, layer_idx: int) -> int:
        """qk_rope_head_dim of one layer."""
        return self.qk_rope_head_dims[layer_idx] if self.qk_rope_head_dims else self.qk_rope_head_dim

    def layer_nope_dim(self, layer_idx: int) -> int:
        """qk_nope_head_dim of one layer."""
        return self.qk_nope_head_dims[layer_idx] if self.qk_nope_head_dims else self.qk_nope_head_dim

    def layer_v_dim(self, layer_idx: int) -> int:
        """v_head_dim of one layer, also the width of the original's heads."""
        return self.v_head_dims[layer_idx] if self.v_head_dims else self.v_head_dim

    def layer_kv_heads(self, layer_idx: int) -> int:
        """KV heads that one layer of the original has."""
        if self.mla_kv_heads:
            return self.mla_kv_heads[layer_idx]
        return getattr(self, "num_key_value_heads", None) or self.num_attention_heads


class WholeConfig:
    """Configuration of a multimodal model whose language model is converted; `text_config` has the fields of `MlaFields`.

    What the original's configuration does not have is read from `text_config`.
    """

    def __post_init__(self, **kwargs):
        """Read the parts; the original's class reads the language model's as its own, which then gets the fields."""
        given = self.text_config
        text = given.to_dict() if isinstance(given, PreTrainedConfig) else dict(given or {})
        if "model_type" in text:
            text["model_type"] = text["model_type"].removeprefix(MODEL_TYPE)
        self.text_config = text or None
        super().__post_init__(**kwargs)
        fields = {**self.text_config.to_dict(), **text}
        fields.pop("model_type")
        self.text_config = config_class(type(self.text_config))(**fields)

    def __getattr__(self, name: str):
        """An attribute of the language model's configuration."""
        text = vars(self).get("text_config")
        if name.startswith("_") or not isinstance(text, MlaFields):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        try:
            return getattr(text, name)
        except RuntimeError as error:  # its layers differ in it
            raise AttributeError(str(error)) from error


def is_whole(base: type) -> bool:
    """Whether a stock configuration class describes a language model and other parts."""
    return "text_config" in base.sub_configs


def config_class(base: type) -> type:
    """The configuration class of a converted model whose original has configuration class `base`."""
    name = PREFIX + base.__name__
    if name not in _classes:
        made = _whole_class(name, base) if is_whole(base) else _text_class(name, base)
        return _classes.setdefault(name, made)  # another thread may have made it meanwhile
    return _classes[name]


def _whole_class(name: str, base: type) -> type:
    fields = {"model_type": MODEL_TYPE + base.model_type, "_auto_class": "AutoConfig", "__module__": __name__}
    return type(name, (WholeConfig, base), fields)


def _text_class(name: str, base: type) -> type:
    fields = {key: value for key, value in vars(MlaFields).items() if not key.startswith("__")}
    fields |= {
        "__annotations__": dict(MlaFields.__annotations__),
        "__module__": __name__,
        "__doc__": f"{base.__name__} of a model converted to Multi-head Latent Attention.",
        "model_type": MODEL_TYPE + base.model_type,
        "_auto_class": "AutoConfig",
        **{plan: None for plan in PARALLEL_PLANS if hasattr(base, plan)},
    }
    return type(name, (base, MlaFields), fields)


def kernel_choice(config: PreTrainedConfig) -> str:
    """The environment variable MLA_CONVERT_KERNEL, else the configuration's mla_kernel.

    Raises:
        ValueError: it is not one of KERNELS.
    """
    choice = os.environ.get("MLA_CONVERT_KERNEL") or config.mla_kernel
    if choice not in KERNELS:
        raise ValueError(f"MLA_CONVERT_KERNEL or mla_kernel is {choice!r}, expected one of {KERNELS}")
    return choice


def warn_if_untried(config: PreTrainedConfig) -> None:
    """Warn if the installed transformers is newer than any that this code was tried with."""
    tried = config.mla_transformers
    if tried and Version(transformers.__version__) > Version(tried):
        warnings.warn(
            f"this converted model was tried with transformers up to {tried}, and {transformers.__version__} is installed: "
            f"`mla-convert verify --run` tries it again, `mla-convert refresh` renews its code",
            stacklevel=2,
        )


def __getattr__(name: str) -> type:
    """`Mla<Base>Config` for any `<Base>Config` of transformers (PEP 562)."""
    if name.startswith(PREFIX) and name.endswith("Config"):
        return config_class(getattr(transformers, name[len(PREFIX) :]))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
