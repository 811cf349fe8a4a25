"""Phi 1, 1.5 and 2."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="phi",
    checkpoints="Phi-1, Phi-1.5, Phi-2",
    traits="partial rotary; bias everywhere, also in the head; parallel residual; per-head norm of query and key in some",
    partial_rotary=True,
    final_norm="final_layernorm",
    output="dense",
    q_norm="q_layernorm",
    k_norm="k_layernorm",
    tested={"phi": {}, "phi-norm": {"qk_layernorm": True, "partial_rotary_factor": 0.25, "hidden_size": 96}},
)
