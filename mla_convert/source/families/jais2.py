"""Jais 2."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="jais2",
    checkpoints="Jais 2 8B",
    traits="bias everywhere",
    tested={"jais2": {"head_dim": 8}},
)
