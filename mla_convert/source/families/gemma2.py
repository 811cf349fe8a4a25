"""Gemma 2."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="gemma2",
    examples="Gemma 2 2B, 9B and 27B",
    special="soft cap on the logits; scale of its own; a window in every other layer; norm behind attention",
    output_norm="post_attention_layernorm",
    softcap="attn_logit_softcapping",
    requires={"use_bidirectional_attention": False},
    tested={
        "gemma2": {
            "head_dim": 8,
            "sliding_window": 12,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        }
    },
)
