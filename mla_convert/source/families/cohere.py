"""Cohere: Command R and Aya."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="cohere",
    examples="Command R, Command R+, Aya 23 and Expanse",
    special="RoPE on neighbouring dims; parallel residual; norm on each head of query and key in Command R+",
    interleaved=True,
    table_step=2,
    q_norm="q_norm",
    k_norm="k_norm",
    tested={"cohere": {"logit_scale": 0.25}, "cohere-norm": {"use_qk_norm": True}},
)
