"""OPT."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="opt",
    checkpoints="OPT 125M, 1.3B to 66B",
    traits="learned positions, no RoPE; bias everywhere",
    layers="model.decoder.layers",
    input_norm="self_attn_layer_norm",
    final_norm="final_layer_norm",
    output="out_proj",
    rotary=False,
    requires={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
    tested={"opt": {"ffn_dim": 64, "word_embed_proj_dim": 48, "init_std": 0.3}},
)
