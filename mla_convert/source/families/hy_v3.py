"""Hunyuan 3."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="hy_v3",
    checkpoints="Hy3 (Hunyuan 3)",
    traits="per-head norm of query and key before RoPE, unlike HunYuan 1; mixture of experts beside a shared one",
    q_norm="q_norm",
    k_norm="k_norm",
    renamed=(
        (".mlp.router.gate.weight", ".mlp.gate.weight"),
        (".mlp.expert_bias", ".mlp.e_score_correction_bias"),
        (".mlp.shared_mlp.", ".mlp.shared_experts."),
    ),
    experts=("gate_proj", "up_proj", "down_proj"),
    tested={
        "hy_v3": {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    },
)
