"""Language models of multimodal types that have no causal class in transformers: each is read as a family.

With the same weights, the family's model computes the same on text. Positions of these types have three axes (M-RoPE), which
are equal for every token of a text; each frequency belongs to one axis, and the conversion mixes no frequencies. The
converted layers get the tables of the type's own rotary module, so that images keep their positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Entries of RoPE parameters that tell the axes apart.
AXES = ("mrope_section", "mrope_interleaved")


@dataclass(frozen=True)
class ReadAs:
    """The family that a language model is read as."""

    family: str
    """The family's `model_type`."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Values of the family's configuration for what the type's code always does."""

    transposed: tuple[str, ...] = ()
    """Ends of the names of tensors that checkpoints store with their last two axes swapped."""


READ_AS = {
    "qwen2_5_vl_text": ReadAs("qwen2"),
    "qwen2_vl_text": ReadAs("qwen2"),
    "qwen3_vl_moe_text": ReadAs(
        "qwen3_moe", {"norm_topk_prob": True}, transposed=(".experts.gate_up_proj", ".experts.down_proj")
    ),
    "qwen3_vl_text": ReadAs("qwen3"),
}
