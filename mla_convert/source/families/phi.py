"""Phi 1, 1.5 and 2."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="phi",
    examples="Phi-1, Phi-1.5, Phi-2",
    special="partial rotary; bias everywhere, the head included; parallel residual; in some a norm on each head of query and key",
    partial_rotary=True,
    final_norm="final_layernorm",
    output="dense",
    q_norm="q_layernorm",
    k_norm="k_layernorm",
    tested={"phi": {}, "phi-norm": {"qk_layernorm": True, "partial_rotary_factor": 0.25, "hidden_size": 96}},
)
