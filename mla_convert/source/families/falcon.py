"""Falcon: the models with RoPE; those with ALiBi are refused."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="falcon",
    checkpoints="Falcon 7B, 11B, 40B and 180B",
    traits="multi-query, or one projection by groups of heads; parallel residual",
    layers="transformer.h",
    attention="self_attention",
    input_norm=("input_layernorm", "ln_attn"),
    final_norm="ln_f",
    output="dense",
    fused="query_key_value",
    fused_rows="groups",
    requires={"alibi": False},
    tested={
        "falcon": {},
        "falcon-40b": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
        "falcon-11b": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        "falcon-sequential": {"multi_query": False, "parallel_attn": False},
    },
)
