"""Nemotron-H, a hybrid: Mamba 2, MLP, mixture of experts or attention without RoPE, one of them in each layer."""

from mla_convert.source.families.base import Family

_SIZES = {
    "initializer_range": 0.1,
    "head_dim": 8,
    "mamba_num_heads": 6,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "layer_types": ["linear_attention", "full_attention", "mlp", "full_attention"],
}

FAMILY = Family(
    model_type="nemotron_h",
    checkpoints="Nemotron-H 4B to 56B, Nemotron Nano 2 and 3",
    traits="hybrid: each layer is Mamba 2, an MLP or experts, or attention, without RoPE",
    attention="mixer",
    input_norm="norm",
    final_norm="norm_f",
    other_layers=("linear_attention", "mlp", "moe"),
    state_mixer="mixer",
    renamed=(("backbone.", "model."),),
    experts=("up_proj", "down_proj"),
    tested={
        "nemotron-h": _SIZES,
        "nemotron-h-moe": {
            **_SIZES,
            "layer_types": ["linear_attention", "full_attention", "moe", "full_attention", "moe"],
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
        },
    },
)
