"""GLM-4 9B of 2024."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="glm",
    checkpoints="GLM-4-9B, GLM-Edge",
    traits="RoPE on adjacent dims of half a head; bias on query, key and value",
    partial_rotary=True,
    interleaved=True,
    tested={"glm": {"head_dim": 16, "attention_bias": True}},
)
