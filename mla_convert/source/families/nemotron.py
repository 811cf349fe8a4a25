"""Nemotron: the dense models of 2024."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="nemotron",
    checkpoints="Nemotron-3 8B, Minitron 4B and 8B, Nemotron-4 340B",
    traits="RoPE on half a head",
    partial_rotary=True,
    tested={"nemotron": {"head_dim": 16}, "nemotron-bias": {"head_dim": 8, "attention_bias": True}},
)
