"""CodeGen."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="codegen",
    checkpoints="CodeGen 350M to 16B",
    traits="as GPT-J; one projection for query, key and value in four shards",
    layers="transformer.h",
    attention="attn",
    input_norm="ln_1",
    final_norm="ln_f",
    output="out_proj",
    fused="qkv_proj",
    fused_rows="shards",
    partial_rotary=True,
    interleaved=True,
    rope_tables="sin, cos",
    tested={"codegen": {"rotary_dim": 4, "num_attention_heads": 4}},
)
