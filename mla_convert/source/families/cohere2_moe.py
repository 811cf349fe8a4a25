"""Cohere 2 with a mixture of experts."""

from mla_convert.source.families.base import Family

_MOE = {
    "logit_scale": 0.25,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "prefix_dense_intermediate_size": 64,
}
_KINDS = ["full_attention", "sliding_attention", "full_attention"]

FAMILY = Family(
    model_type="cohere2_moe",
    checkpoints="Command A+",
    traits="RoPE on adjacent dims, only in sliding-window layers and in layers without experts; parallel residual; mixture of "
    "experts",
    interleaved=True,
    freq_stride=2,
    rope_layer_type="sliding_attention",
    rope_in_dense_layers="prefix_dense_sliding_window_pattern",
    experts=("gate_proj", "up_proj", "down_proj"),
    tested={
        "cohere2_moe": {
            **_MOE,
            "sliding_window": 12,
            "layer_types": _KINDS,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_shared_experts": 1,
        },
        "cohere2_moe-dense-as-others": {
            **_MOE,
            "sliding_window": 12,
            "layer_types": _KINDS,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "prefix_dense_sliding_window_pattern": 2,
            "rms_norm_eps": 1e-6,
        },
    },
)
