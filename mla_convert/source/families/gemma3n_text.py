"""Gemma 3n, its text models."""

from mla_convert.source.families.base import Family
from mla_convert.source.families.gemma4_text import INPUTS, SHARED

FAMILY = Family(
    model_type="gemma3n_text",
    checkpoints="Gemma 3n E2B and E4B",
    traits="the last layers attend to the latents of earlier ones; per-head norm of query, key and value; four streams of hidden "
    "states (AltUp); sliding windows in most layers, with their own RoPE base; norm after attention",
    output_norm="post_attention_layernorm",
    q_norm="q_norm",
    k_norm="k_norm",
    v_norm="v_norm",
    shared="num_kv_shared_layers",
    layer_inputs="hidden_size_per_layer_input",
    streams="altup_num_inputs",
    requires={"altup_active_idx": 0, "use_bidirectional_attention": False},
    tested={
        "gemma3n": {
            **SHARED,
            **INPUTS,
            "head_dim": 8,
            "sliding_window": 12,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "final_logit_softcapping": 5.0,
            "laurel_rank": 8,
            "altup_num_inputs": 3,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.5, 0.0],
        },
        "gemma3n-own-latents": {
            **INPUTS,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "sliding_window": 12,
            "num_kv_shared_layers": 0,
            "laurel_rank": 8,
        },
    },
)
