"""Arcee: Llama's attention; its MLP has no gate."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="arcee",
    checkpoints="AFM-4.5B",
    traits="as Llama",
    tested={
        "arcee": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        "arcee-bias": {"head_dim": 16, "attention_bias": True, "mlp_bias": True},
    },
)
