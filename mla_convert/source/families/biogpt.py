"""BioGPT."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="biogpt",
    checkpoints="BioGPT, BioGPT-Large",
    traits="learned positions, no RoPE; bias everywhere",
    layers="biogpt.layers",
    input_norm="self_attn_layer_norm",
    final_norm="layer_norm",
    output="out_proj",
    rotary=False,
    requires={"layerdrop": 0.0},
    tested={"biogpt": {}},
)
