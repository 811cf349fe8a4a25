"""GPT-NeoX, Pythia and related models."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="gpt_neox",
    checkpoints="Pythia 14M to 12B, GPT-NeoX-20B, Dolly v2, RedPajama-INCITE",
    traits="one projection for query, key and value, head by head; partial rotary; parallel residual",
    partial_rotary=True,
    layers="gpt_neox.layers",
    attention="attention",
    final_norm="final_layer_norm",
    output="dense",
    fused="query_key_value",
    fused_rows="groups",
    renamed=(("embed_out.", "lm_head."),),
    tested={
        "pythia": {"hidden_size": 96},
        "gpt-neox-sequential": {
            "use_parallel_residual": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
    },
)
