"""gpt-oss."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="gpt_oss",
    checkpoints="gpt-oss 20B and 120B, MXFP4 or in bfloat16",
    traits="attention sinks; a sliding window in every other layer; YaRN; mixture of experts",
    sinks="sinks",
    tested={
        "gpt-oss": {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 12,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        }
    },
)
