"""Llama and everything that shares its architecture."""

from mla_convert.source.families.base import Family

_SCALED = {"rope_theta": 10000.0, "factor": 4.0}
_SHORT = {"original_max_position_embeddings": 64}

FAMILY = Family(
    model_type="llama",
    checkpoints="Llama 1 to 3.3, SmolLM, SmolLM2, TinyLlama, DeepSeek-LLM, Yi",
    traits="every RoPE scaling; optional biases",
    tested={
        "llama": {"head_dim": 8},
        "llama3-rope": {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        "llama-linear": {"head_dim": 8, "rope_parameters": {"rope_type": "linear", **_SCALED}},
        "llama-dynamic": {
            "head_dim": 8,
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", **_SCALED},
        },
        "llama-yarn": {"head_dim": 8, "rope_parameters": {"rope_type": "yarn", **_SCALED, **_SHORT}},
        "llama-longrope": {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.3, 1.6],
                "long_factor": [1.0, 1.5, 2.5, 4.0],
                "original_max_position_embeddings": 64,
            },
        },
        "llama-bias-wide-heads": {"head_dim": 16, "attention_bias": True},
        "llama-mha-tied": {"head_dim": 16, "num_key_value_heads": 6, "tie_word_embeddings": True},
    },
)
