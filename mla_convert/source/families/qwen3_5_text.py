"""Qwen3.5, a hybrid: three layers of gated delta net (linear attention) to one of gated attention."""

from dataclasses import replace

from mla_convert.source.families.qwen3_next import FAMILY as QWEN3_NEXT
from mla_convert.source.families.qwen3_next import GATED

ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}

FAMILY = replace(
    QWEN3_NEXT,
    model_type="qwen3_5_text",
    checkpoints="Qwen3.5 0.8B to 27B",
    experts=None,
    tested={"qwen3.5": {**GATED, "rope_parameters": ROPE}},
)
