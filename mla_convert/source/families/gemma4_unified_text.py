"""Gemma 4 unified, its text models."""

from dataclasses import replace

from mla_convert.source.families.gemma4_text import FAMILY as GEMMA4
from mla_convert.source.families.gemma4_text import WIDE

FAMILY = replace(
    GEMMA4,
    model_type="gemma4_unified_text",
    checkpoints="Gemma 4 unified",
    layer_inputs=None,
    tested={"gemma4-unified": WIDE},
)
