"""Persimmon."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="persimmon",
    checkpoints="Persimmon 8B",
    traits="one projection for query, key and value, head by head; per-head norm of query and key; RoPE on half a head",
    partial_rotary=True,
    output="dense",
    fused="query_key_value",
    fused_rows="groups",
    final_norm="final_layernorm",
    q_norm="q_layernorm",
    k_norm="k_layernorm",
    tested={"persimmon": {"hidden_size": 96}, "persimmon-no-norm": {"hidden_size": 96, "qk_layernorm": False}},
)
