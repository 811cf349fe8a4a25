"""StableLM."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="stablelm",
    checkpoints="StableLM 3B, Stable LM 2 1.6B and 12B",
    traits="partial rotary; in some a separate norm for each head of query and key, in some a parallel residual",
    partial_rotary=True,
    q_norm="q_layernorm",
    k_norm="k_layernorm",
    qk_norm_shape="heads first",
    tested={
        "stablelm": {"hidden_size": 96, "use_qkv_bias": True},
        "stablelm-12b": {
            "hidden_size": 96,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "qk_layernorm": True,
            "use_parallel_residual": True,
        },
    },
)
