"""OLMoE."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="olmoe",
    checkpoints="OLMoE 1B-7B",
    traits="norm over all heads of query and key together; mixture of experts",
    q_norm="q_norm",
    k_norm="k_norm",
    qk_norm_shape="all",
    experts=("gate_proj", "up_proj", "down_proj"),
    requires={"clip_qkv": None},
    tested={"olmoe": {"num_experts": 4, "num_experts_per_tok": 2}},
)
