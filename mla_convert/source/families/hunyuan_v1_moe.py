"""HunYuan 1 with a mixture of experts."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="hunyuan_v1_moe",
    checkpoints="Hunyuan A13B",
    traits="as HunYuan 1; mixture of experts beside a shared one",
    q_norm="query_layernorm",
    k_norm="key_layernorm",
    norm_after_rope=True,
    experts=("gate_proj", "up_proj", "down_proj"),
    tested={"hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2}},
)
