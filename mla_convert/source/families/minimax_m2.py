"""MiniMax M2."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="minimax_m2",
    checkpoints="MiniMax-M2",
    traits="RoPE on half a head; norm over all heads of query and key together; mixture of experts",
    partial_rotary=True,
    q_norm="q_norm",
    k_norm="k_norm",
    qk_norm_shape="all",
    renamed=((".block_sparse_moe.", ".mlp."),),
    experts=("w1", "w3", "w2"),
    tested={
        "minimax_m2": {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    },
)
