"""Mistral 7B and its kin."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="mistral",
    checkpoints="Mistral 7B v0.1 to v0.3, Mistral-Nemo",
    traits="sliding window in v0.1",
    tested={
        "mistral": {"head_dim": 8, "sliding_window": None},
        "mistral-window": {"head_dim": 8, "sliding_window": 12},
    },
)
