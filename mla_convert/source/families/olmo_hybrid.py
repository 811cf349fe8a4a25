"""OLMo Hybrid: three layers of gated delta net (linear attention) to one of attention, without RoPE in released models."""

from mla_convert.source.families.base import Family

_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}

FAMILY = Family(
    model_type="olmo_hybrid",
    checkpoints="OLMo Hybrid 7B",
    traits="hybrid: one layer in four has attention; norm of all of query and key; norm after attention, none before it",
    input_norm=None,
    output_norm="post_attention_layernorm",
    q_norm="q_norm",
    k_norm="k_norm",
    qk_norm_shape="all",
    other_layers=("linear_attention",),
    state_mixer="linear_attn",
    renamed=(
        ("attention_layer_norm", "input_layernorm"),
        ("feedforward_layer_norm", "post_attention_layernorm"),
    ),
    joined=(("conv1d.weight", ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight")),),
    tested={
        "olmo-hybrid": {**_LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": None}},
        "olmo-hybrid-rope": {**_LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    },
)
