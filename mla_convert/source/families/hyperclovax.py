"""HyperCLOVA X SEED."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="hyperclovax",
    checkpoints="HyperCLOVA X SEED Think 14B",
    traits="norm after attention; multipliers as Granite",
    output_norm="post_norm1",
    residual_multiplier="residual_multiplier",
    tested={
        "hyperclovax": {
            "head_dim": 8,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
        "hyperclovax-no-post-norm": {"head_dim": 16, "attention_bias": True, "use_post_norm": False},
    },
)
