"""Gemma 4, its text models."""

from mla_convert.source.families.base import Family

ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
# Heads of full-attention layers are wider and fewer, and their values are the output of the key projection.
WIDE = {
    "head_dim": 8,
    "global_head_dim": 16,
    "num_key_value_heads": 3,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "sliding_window": 12,
    "rope_parameters": ROPE,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
# The last three layers attend to the keys and values of the first two.
SHARED = {
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
    "num_kv_shared_layers": 3,
}
INPUTS = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 264}
PLAIN = {"hidden_size_per_layer_input": 0}

FAMILY = Family(
    model_type="gemma4_text",
    checkpoints="Gemma 4 E2B, E4B, 26B-A4B and 31B",
    traits="heads of full-attention layers are wider, in the large models fewer, with unnormed keys as values, and RoPE turns a "
    "part of them; per-head norm of query, key and value; sliding windows in most layers, with their own RoPE base; the last "
    "layers of the small models attend to the latents of earlier ones; norm after attention; mixture of experts",
    output_norm="post_attention_layernorm",
    q_norm="q_norm",
    k_norm="k_norm",
    v_norm="v_norm",
    heads_by_layer=True,
    one_projection="attention_k_eq_v",
    shared="num_kv_shared_layers",
    layer_inputs="hidden_size_per_layer_input",
    requires={
        "use_bidirectional_attention": (None, "vision"),  # the latter: among the tokens of an image
    },
    tested={
        "gemma4": {**WIDE, **PLAIN, "final_logit_softcapping": 5.0},
        "gemma4-moe": {
            **WIDE,
            **PLAIN,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
            "attention_bias": True,
        },
        "gemma4-own-values": {**WIDE, **PLAIN, "attention_k_eq_v": False},
        "gemma4-shared": {
            **WIDE,
            **SHARED,
            **INPUTS,
            "attention_k_eq_v": False,
            "use_double_wide_mlp": True,
        },
    },
)
