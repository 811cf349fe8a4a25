"""FlexOlmo."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="flex_olmo",
    checkpoints="FlexOlmo 7x7B",
    traits="norm over all heads of query and key together; norm after attention, none before it; mixture of experts",
    input_norm=None,
    output_norm="post_attention_layernorm",
    q_norm="q_norm",
    k_norm="k_norm",
    qk_norm_shape="all",
    experts=("gate_proj", "up_proj", "down_proj"),
    tested={"flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2}},
)
