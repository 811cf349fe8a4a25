"""Falcon-H1, a hybrid: attention and Mamba 2 side by side in every layer."""

from mla_convert.source.families.base import Family
from mla_convert.source.families.granitemoehybrid import MAMBA_2

FAMILY = Family(
    model_type="falcon_h1",
    checkpoints="Falcon-H1 0.5B to 34B",
    traits="hybrid: attention and Mamba 2 side by side in every layer; scaled keys, inputs and outputs of attention",
    input_multiplier="attention_in_multiplier",
    residual_multiplier="attn_out_multiplier",
    key_multiplier="key_multiplier",
    final_norm="final_layernorm",
    attention_layers=("hybrid",),
    state_mixer="mamba",
    tested={
        "falcon-h1": {
            **MAMBA_2,
            "mamba_d_ssm": 96,
            "key_multiplier": 0.5,
            "attention_in_multiplier": 1.5,
            "attention_out_multiplier": 0.7,
            "embedding_multiplier": 3.0,
            "lm_head_multiplier": 0.3,
            "ssm_multipliers": [1.0, 0.5, 1.0, 2.0, 1.0],
        },
        "falcon-h1-bias": {**MAMBA_2, "mamba_d_ssm": 96, "key_multiplier": 1.5, "attention_bias": True},
    },
)
