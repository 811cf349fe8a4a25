"""Qwen2 and Qwen2.5."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="qwen2",
    checkpoints="Qwen2, Qwen2.5",
    traits="bias on query, key and value",
    tested={
        "qwen2": {},
        "qwen2-window": {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 1},
    },
)
