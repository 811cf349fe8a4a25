"""Aria, its language model."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="aria_text",
    checkpoints="Aria, the language model",
    traits="mixture of experts beside shared ones",
    renamed=((".experts.fc1.weight", ".experts.gate_up_proj"), (".experts.fc2.weight", ".experts.down_proj")),
    tested={"aria_text": {"head_dim": 8, "moe_num_experts": 4, "attention_bias": True}},
)
