"""GLM-4-0414."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="glm4",
    checkpoints="GLM-4-9B-0414, GLM-4-32B-0414, GLM-Z1",
    traits="RoPE on adjacent dims of half a head; norm after attention",
    partial_rotary=True,
    output_norm="post_self_attn_layernorm",
    interleaved=True,
    tested={"glm4": {"head_dim": 16, "attention_bias": True}},
)
