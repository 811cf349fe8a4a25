"""Gemma 2."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="gemma2",
    checkpoints="Gemma 2 2B, 9B and 27B",
    traits="soft cap on the logits; its own scale; a sliding window in every other layer; norm after attention",
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
