"""Apertus."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="apertus",
    checkpoints="Apertus 8B and 70B",
    traits="per-head norm of query and key; RoPE scaled as Llama 3",
    input_norm="attention_layernorm",
    q_norm="q_norm",
    k_norm="k_norm",
    tested={
        "apertus": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        },
        "apertus-bias": {"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    },
)
