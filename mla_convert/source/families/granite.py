"""Granite 3, dense."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="granite",
    checkpoints="Granite 3.0 to 3.3, dense",
    traits="multipliers on embeddings, attention, residual stream and logits",
    residual_multiplier="residual_multiplier",
    tested={
        "granite": {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        }
    },
)
