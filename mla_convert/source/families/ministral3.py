"""Ministral 3: queries grow with their position, past the context that the model was pretrained on."""

from mla_convert.source.families.base import Family, QueryGrowth

FAMILY = Family(
    model_type="ministral3",
    checkpoints="Ministral 3 3B, 8B and 14B",
    traits="YaRN; queries grow with their position",
    query_growth=QueryGrowth("llama_4_scaling_beta", "original_max_position_embeddings"),
    tested={
        "ministral3": {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.7,
                "max_position_embeddings": 256,
            },
        },
        "ministral3-window": {
            "head_dim": 8,
            "sliding_window": 12,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "llama_4_scaling_beta": 0.0,
                "original_max_position_embeddings": 8,
            },
        },
    },
)
