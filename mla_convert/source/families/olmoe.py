"""OLMoE."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="olmoe",
    examples="OLMoE 1B-7B",
    special="norm over all heads of query and key together; mixture of experts",
    q_norm="q_norm",
    k_norm="k_norm",
    norm_over="all",
    experts=("gate_proj", "up_proj", "down_proj"),
    requires={"clip_qkv": None},
    tested={"olmoe": {"num_experts": 4, "num_experts_per_tok": 2}},
)
