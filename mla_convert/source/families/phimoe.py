"""Phi-3.5-MoE."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="phimoe",
    checkpoints="Phi-3.5-MoE",
    traits="bias everywhere; longrope; mixture of experts",
    renamed=((".block_sparse_moe.", ".mlp."), (".gate.weight", ".router.weight")),
    experts=("w1", "w3", "w2"),
    tested={
        "phimoe": {
            "attention_bias": True,
            "lm_head_bias": True,
            "num_local_experts": 4,
            "sliding_window": 12,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.3, 1.6],
                "long_factor": [1.0, 1.5, 2.5, 4.0],
                "short_mscale": 1.2,
                "long_mscale": 1.3,
                "original_max_position_embeddings": 64,
            },
        },
    },
)
