"""Qwen3.5 with a mixture of experts."""

from dataclasses import replace

from mla_convert.source.families.qwen3_5_text import ROPE
from mla_convert.source.families.qwen3_next import FAMILY as QWEN3_NEXT
from mla_convert.source.families.qwen3_next import GATED

FAMILY = replace(
    QWEN3_NEXT,
    model_type="qwen3_5_moe_text",
    checkpoints="Qwen3.5 35B-A3B, 122B-A10B and 397B-A17B",
    tested={
        "qwen3.5-moe": {
            **GATED,
            "rope_parameters": ROPE,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
    },
)
