"""Cohere: Command R and Aya."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="cohere",
    checkpoints="Command R, Command R+, Aya 23 and Expanse",
    traits="RoPE on adjacent dims; parallel residual; per-head norm of query and key in Command R+",
    interleaved=True,
    freq_stride=2,
    q_norm="q_norm",
    k_norm="k_norm",
    tested={"cohere": {"logit_scale": 0.25}, "cohere-norm": {"use_qk_norm": True}},
)
