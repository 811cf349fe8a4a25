"""StarCoder 1 and SantaCoder."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="gpt_bigcode",
    checkpoints="StarCoder, StarCoderBase, SantaCoder",
    traits="multi-query; learned positions, no RoPE",
    layers="transformer.h",
    attention="attn",
    input_norm="ln_1",
    final_norm="ln_f",
    output="c_proj",
    fused="c_attn",
    fused_rows="groups",
    rotary=False,
    requires={"add_cross_attention": False},
    tested={"gpt_bigcode": {}, "gpt_bigcode-mha": {"multi_query": False, "n_head": 6, "scale_attn_weights": False}},
)
