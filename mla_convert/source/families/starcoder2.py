"""StarCoder 2."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="starcoder2",
    checkpoints="StarCoder2 3B, 7B and 15B",
    traits="bias everywhere; sliding window",
    tested={"starcoder2": {"sliding_window": 12}},
)
