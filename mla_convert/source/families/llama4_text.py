"""Llama 4, its language model."""

from mla_convert.source.families.base import Family, QueryGrowth

_MOE = {"intermediate_size_mlp": 64, "num_local_experts": 4, "head_dim": 8}

FAMILY = Family(
    model_type="llama4_text",
    checkpoints="Llama 4 Scout and Maverick, the language model",
    needs="5.24.0",  # that of 5.17 cannot generate with a static cache and chunks
    traits="RoPE on adjacent dims, in three layers of four, which attend in chunks; in Scout a norm of query and key after RoPE, "
    "which it commutes with because it has no weights; elsewhere queries grow with their position; mixture of experts",
    attention_layers=("full_attention", "chunked_attention"),
    interleaved=True,
    rope_tables="complex",
    rope_layers="no_rope_layers",
    q_norm="qk_norm",
    k_norm="qk_norm",
    norm_after_rope=True,
    query_growth=QueryGrowth("attn_scale", "floor_scale", first=1, switch="attn_temperature_tuning", without_rope=True),
    tested={
        "llama4_text": {
            **_MOE,
            "no_rope_layers": [1, 0, 1],
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
            "attention_chunk_size": 12,
            "floor_scale": 8,
            "attn_scale": 0.7,
        },
        "llama4_text-no-norm": {
            **_MOE,
            "use_qk_norm": False,
            "no_rope_layers": [1, 1, 0],
            "layer_types": ["full_attention"] * 3,
            "attn_temperature_tuning": False,
            "attention_bias": True,
        },
    },
)
