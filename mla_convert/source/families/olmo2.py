"""OLMo 2."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="olmo2",
    examples="OLMo 2 1B to 32B",
    special="norm over all heads of query and key together; norm behind attention, none before it",
    input_norm=None,
    output_norm="post_attention_layernorm",
    q_norm="q_norm",
    k_norm="k_norm",
    norm_over="all",
    tested={"olmo2": {}},
)
