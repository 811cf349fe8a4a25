"""Gemma 1."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="gemma",
    checkpoints="Gemma 2B and 7B, CodeGemma",
    traits="multi-query or multi-head attention with wide heads",
    requires={"use_bidirectional_attention": False},
    tested={"gemma": {"head_dim": 16, "num_key_value_heads": 1}},
)
