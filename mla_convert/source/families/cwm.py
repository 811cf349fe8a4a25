"""CWM: Code World Model."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="cwm",
    checkpoints="CWM 32B",
    traits="sliding windows in three layers of four; RoPE scaled as Llama 3",
    tested={
        "cwm": {
            "head_dim": 8,
            "sliding_window": 12,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 32,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        },
    },
)
