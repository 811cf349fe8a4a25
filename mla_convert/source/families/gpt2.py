"""GPT-2."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="gpt2",
    checkpoints="GPT-2 124M to 1.5B, DistilGPT2",
    traits="learned positions, no RoPE; one transposed projection for query, key and value",
    layers="transformer.h",
    attention="attn",
    input_norm="ln_1",
    final_norm="ln_f",
    output="c_proj",
    fused="c_attn",
    rotary=False,
    requires={"add_cross_attention": False},
    tested={"gpt2": {}, "gpt2-scaled-by-layer": {"scale_attn_by_inverse_layer_idx": True}},
)
