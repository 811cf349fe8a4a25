"""Seed-OSS."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="seed_oss",
    checkpoints="Seed-OSS-36B",
    traits="bias on query, key and value",
    tested={
        "seed_oss": {"head_dim": 16},
        "seed_oss-out-bias": {"head_dim": 8, "attention_bias": False, "attention_out_bias": True},
    },
)
