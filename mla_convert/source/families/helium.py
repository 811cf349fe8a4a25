"""Helium: head_dim in its configuration defaults to 128, so tiny test models must state it."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="helium",
    checkpoints="Helium-1 2B",
    traits="RoPE on adjacent dims",
    interleaved=True,
    tested={
        "helium": {"head_dim": 8},
        "helium-mha-bias": {"head_dim": 8, "attention_bias": True, "num_key_value_heads": 6},
    },
)
