"""Ministral 8B."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="ministral",
    checkpoints="Ministral 8B of 2024",
    traits="sliding windows in three layers of four",
    tested={
        "ministral": {
            "head_dim": 16,
            "sliding_window": 12,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    },
)
