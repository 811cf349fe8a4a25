"""Configuration of a model converted to Multi-head Latent Attention (MLA).

`Mla<Base>Config` exists for every transformers configuration `<Base>Config`: the original's fields plus the ones below.
Fields take DeepSeek-V2's names (arXiv 2405.04434) where the object is the same. This file needs only transformers; it is
also written beside the weights of a converted model.
"""

import transformers

PREFIX = "Mla"
# The projections that these plans of the stock classes name do not exist in a converted model.
PARALLEL_PLANS = ("base_model_tp_plan", "base_model_fsdp_plan")

_classes: dict[str, type] = {}


class MlaFields:
    """Fields that a converted model's configuration adds to the original's."""

    # Numbers cached per token: kv_lora_rank of latent and qk_rope_head_dim of rotary key, both shared by all heads.
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    # Per head: width of the query and key part without position, and of the value.
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    # Widest query-key product; transformers' generate reads it to leave the static cache's shape to the first update.
    qk_head_dim: int = 192
    # One entry a layer where layers differ; the fields without s then hold the largest.
    kv_lora_ranks: list[int] | None = None
    qk_rope_head_dims: list[int] | None = None
    qk_nope_head_dims: list[int] | None = None
    # Which projections carry a bias (they do where the original's do).
    mla_q_bias: bool = False
    mla_kv_bias: bool = False
    mla_o_bias: bool = False
    # Where the stock model has its attention: path of the list of layers, and the name inside a layer.
    mla_layers: str = "model.layers"
    mla_attention: str = "self_attn"
    # Names of the stock attention's norms of query and key, and what they are called with (`apply_norm`).
    mla_q_norm: str | None = None
    mla_k_norm: str | None = None
    mla_norm_over: str = "head"
    # Cap of the attention logits; name of the stock attention's parameter with the sinks' logits.
    mla_softcap: float | None = None
    mla_sinks: str | None = None
    # What attends when decoding: "kernels" (the kernels of mla_attention, or an error), "sdpa" (the library's attention), or
    # "auto" (the kernels where they can serve, else the library's). The variable MLA_CONVERT_KERNEL goes before it.
    mla_kernel: str = "auto"
    # Version of the checkpoint format.
    mla_format: int = 1

    def layer_rank(self, layer_idx: int) -> int:
        """kv_lora_rank of one layer."""
        return self.kv_lora_ranks[layer_idx] if self.kv_lora_ranks else self.kv_lora_rank

    def layer_rope_dim(self, layer_idx: int) -> int:
        """qk_rope_head_dim of one layer."""
        return self.qk_rope_head_dims[layer_idx] if self.qk_rope_head_dims else self.qk_rope_head_dim

    def layer_nope_dim(self, layer_idx: int) -> int:
        """qk_nope_head_dim of one layer."""
        return self.qk_nope_head_dims[layer_idx] if self.qk_nope_head_dims else self.qk_nope_head_dim


def config_class(base: type) -> type:
    """The configuration class of a converted model whose original has configuration class `base`."""
    name = PREFIX + base.__name__
    if name not in _classes:
        fields = {key: value for key, value in vars(MlaFields).items() if not key.startswith("__")}
        _classes[name] = type(
            name,
            (base,),
            {
                **fields,
                "__annotations__": dict(MlaFields.__annotations__),
                "__module__": __name__,
                "__doc__": f"{base.__name__} of a model converted to Multi-head Latent Attention.",
                "model_type": "mla_" + base.model_type,
                "_auto_class": "AutoConfig",
                **{plan: None for plan in PARALLEL_PLANS if hasattr(base, plan)},
            },
        )
    return _classes[name]


def __getattr__(name: str) -> type:
    """`Mla<Base>Config` for any `<Base>Config` of transformers (PEP 562)."""
    if name.startswith(PREFIX) and name.endswith("Config"):
        return config_class(getattr(transformers, name[len(PREFIX) :]))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
