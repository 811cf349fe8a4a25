"""Apertus 1.5, its language model."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="apertus1p5_text",
    checkpoints="Apertus 1.5 8B",
    traits="per-head norm of query and key",
    input_norm="attention_layernorm",
    q_norm="q_norm",
    k_norm="k_norm",
    tested={"apertus1p5_text": {"attention_bias": True}},
)
