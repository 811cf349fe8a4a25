"""From a source layer's attention tensors to an MLA attention module, and the configuration of the converted model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from mla_convert.factorise import AttentionWeights, Geometry, MlaWeights
from mla_convert.modeling.configuration_mla import config_class
from mla_convert.modeling.modeling_mla import MlaAttention
from mla_convert.plan import AttentionShape, Plan
from mla_convert.source import Source


def mla_config(source: Source, plan: Plan, dtype: torch.dtype) -> PreTrainedConfig:
    """Configuration of the converted model: the source's, and the sizes of its latent attention."""
    family, names = source.family, set(source.reader.names())
    prefix = f"{family.layers}.0.{family.attention}."
    fields = source.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "_name_or_path", "transformers_version", "dtype"):
        fields.pop(key, None)
    rope_dim = max(size.rope_dim for size in plan.layers)
    config = config_class(type(source.config))(
        **fields,
        dtype=dtype,
        kv_lora_rank=max(size.rank for size in plan.layers),
        qk_rope_head_dim=rope_dim,
        kv_lora_ranks=[size.rank for size in plan.layers] if plan.sizes else None,
        qk_rope_head_dims=[size.rope_dim for size in plan.layers] if plan.sizes else None,
        qk_nope_head_dim=plan.qk_nope_head_dim,
        v_head_dim=plan.shape.head_dim,
        qk_head_dim=plan.qk_nope_head_dim + rope_dim,
        mla_q_bias=f"{prefix}{family.query}.bias" in names,
        mla_kv_bias=plan.shape.has_kv_bias,
        mla_o_bias=f"{prefix}{family.output}.bias" in names,
    )
    config._attn_implementation = "sdpa"  # transformers sets it when it builds a model; here only layers are built
    return config


def is_attention_tensor(source: Source, name: str) -> bool:
    """Whether a source tensor belongs to a projection that the conversion replaces."""
    family = source.family
    projections = (family.query, family.key, family.value, family.output)
    return any(f".{family.attention}.{projection}." in name for projection in projections)


def attention_weights(
    source: Source, layer: nn.Module, shape: AttentionShape, rope_scale: float
) -> tuple[AttentionWeights, Geometry]:
    """Projections and geometry of a loaded source layer's attention."""
    family = source.family
    attention = getattr(layer, family.attention)
    parts: dict[str, Tensor | None] = {}
    for letter, name in zip("qkvo", (family.query, family.key, family.value, family.output), strict=True):
        projection = getattr(attention, name)
        parts[letter], parts[f"{letter}_bias"] = projection.weight, projection.bias
    geometry = Geometry(shape.num_heads, shape.num_kv_heads, shape.head_dim, attention.scaling, rope_scale)
    return AttentionWeights(**parts), geometry


def build_attention(config: PreTrainedConfig, index: int, scaling: float, device: torch.device) -> MlaAttention:
    """An MLA attention module of one layer without values, float32."""
    with torch.device("meta"):
        module = MlaAttention(config, index, scaling)
    return module.to_empty(device=device).float().eval()


@torch.no_grad()
def fill_attention(module: MlaAttention, weights: MlaWeights) -> None:
    """Put factorised weights into the module."""
    for projection, weight, bias in (
        (module.q_proj, weights.q_proj, weights.q_bias),
        (module.kv_a_proj_with_mqa, weights.kv_a, weights.kv_a_bias),
        (module.kv_b_proj, weights.kv_b, None),
        (module.o_proj, weights.o_proj, weights.o_bias),
    ):
        projection.weight.copy_(weight)
        if bias is not None:
            projection.bias.copy_(bias)
    module.rope_freq_index.copy_(weights.freq_index)
