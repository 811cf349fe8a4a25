"""ERNIE 4.5, dense."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="ernie4_5",
    checkpoints="ERNIE 4.5 0.3B",
    traits="RoPE on adjacent dims",
    interleaved=True,
    tested={"ernie4_5": {"head_dim": 16}, "ernie4_5-bias": {"head_dim": 8, "use_bias": True}},
)
