"""GPT-J."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="gptj",
    checkpoints="GPT-J 6B",
    traits="RoPE on the first adjacent dims of a head; parallel residual",
    layers="transformer.h",
    attention="attn",
    input_norm="ln_1",
    final_norm="ln_f",
    output="out_proj",
    partial_rotary=True,
    interleaved=True,
    rope_tables="sin, cos",
    tested={"gptj": {"rotary_dim": 4}, "gptj-all-dims": {"rotary_dim": 8}},
)
