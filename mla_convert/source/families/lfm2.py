"""LFM2, a hybrid: short convolutions in most layers, attention in the others."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="lfm2",
    checkpoints="LFM2 350M to 2.6B",
    traits="hybrid: short convolutions in most layers; per-head norm of query and key",
    input_norm="operator_norm",
    final_norm="embedding_norm",
    output="out_proj",
    q_norm="q_layernorm",
    k_norm="k_layernorm",
    other_layers=("conv",),
    state_mixer="conv",
    tested={
        "lfm2": {"layer_types": ["conv", "full_attention", "full_attention"], "block_auto_adjust_ff_dim": False},
        "lfm2-tied-bias": {
            "layer_types": ["full_attention", "conv", "full_attention"],
            "conv_bias": True,
            "tie_embedding": True,
        },
    },
)
