"""Qwen3."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="qwen3",
    checkpoints="Qwen3 0.6B to 32B",
    traits="per-head norm of query and key",
    q_norm="q_norm",
    k_norm="k_norm",
    tested={
        "qwen3": {"head_dim": 16},
        "qwen3-bias-window": {
            "head_dim": 8,
            "attention_bias": True,
            "sliding_window": 12,
            "use_sliding_window": True,
            "max_window_layers": 1,
        },
    },
)
