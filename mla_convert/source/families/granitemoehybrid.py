"""Granite 4, a hybrid: Mamba 2 in most layers, attention in the others, most without RoPE."""

from mla_convert.source.families.base import Family

MAMBA_2 = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
_MULTIPLIERS = {
    "embedding_multiplier": 6.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "shared_intermediate_size": 64,
}

FAMILY = Family(
    model_type="granitemoehybrid",
    checkpoints="Granite 4.0 micro, tiny and small, dense and hybrid",
    traits="hybrid: Mamba 2 in most layers; no RoPE in the hybrid ones; own softmax scale; scaled residuals; some with experts",
    residual_multiplier="residual_multiplier",
    other_layers=("linear_attention",),
    state_mixer="mamba",
    renamed=(
        ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
        ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
        ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
    ),
    tested={
        "granite4-moe": {
            **MAMBA_2,
            **_MULTIPLIERS,
            "layer_types": ["linear_attention", "full_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 24,
        },
        "granite4-dense-rope": {
            **MAMBA_2,
            **_MULTIPLIERS,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "num_local_experts": 0,
            "position_embedding_type": "rope",
        },
    },
)
