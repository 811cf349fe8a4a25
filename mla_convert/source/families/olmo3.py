"""OLMo 3."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="olmo3",
    checkpoints="OLMo 3 7B and 32B",
    traits="as OLMo 2; sliding windows in three layers of four, YaRN in the others",
    input_norm=None,
    output_norm="post_attention_layernorm",
    q_norm="q_norm",
    k_norm="k_norm",
    qk_norm_shape="all",
    tested={
        "olmo3": {
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
        }
    },
)
