"""OLMo 2."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="olmo2",
    checkpoints="OLMo 2 1B to 32B",
    traits="norm over all heads of query and key together; norm after attention, none before it",
    input_norm=None,
    output_norm="post_attention_layernorm",
    q_norm="q_norm",
    k_norm="k_norm",
    qk_norm_shape="all",
    tested={"olmo2": {}},
)
