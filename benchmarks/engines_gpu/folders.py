"""Folders with a config.json and no weights, which engines serve with random ones: an original and its conversions."""

from __future__ import annotations

import json
from pathlib import Path

from mla_convert.evaluate.speed.models import converted_config, shape_config
from mla_convert.evaluate.speed.shapes import SHAPES

# Forms that are compared: the original, its `portable` export, the converted folder with the plugin.
FORMS = ("original", "portable", "plugin")
# Packed rows of a converted folder, in the place of a --kv-cache-dtype of vLLM.
ROWS = {
    "int4": {"version": 1, "kind": "int4", "group": 64, "rope": "fp8"},
    "int4-keys": {"version": 1, "kind": "int4", "group": 48, "rope": "int4"},
}


def portable(fields: dict, rank: int, rope_dim: int, nope_dim: int | None = None) -> dict:
    """config.json of a `portable` export, as mla_convert/publish/engines/deepseek_config.py writes it."""
    layers, heads = fields["num_hidden_layers"], fields["num_attention_heads"]
    width = fields["hidden_size"] // heads
    kept = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
    theta = fields.get("rope_theta", 1e4)
    return {
        **{key: fields[key] for key in kept}, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "dtype": "bfloat16", "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False,
        "q_lora_rank": None, "kv_lora_rank": rank, "qk_rope_head_dim": rope_dim, "v_head_dim": 128,
        "qk_nope_head_dim": nope_dim or width, "rope_interleave": True, "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta}, "first_k_dense_replace": layers,
        "moe_layer_freq": 1, "moe_intermediate_size": fields["intermediate_size"], "n_routed_experts": 8,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
        "routed_scaling_factor": 1.0, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 0,
    }  # fmt: skip


def write(
    out: Path, shape: str, form: str, rank: int, rope_dim: int, nope_dim: int | None = None, rows: str = ""
) -> Path:
    """Write the folder of one form of a shape; returns it.

    Args:
        out: holds the folders.
        shape: of SHAPES.
        form: of FORMS.
        rank: of conversions.
        rope_dim: likewise.
        nope_dim: content dims of their heads; None: all.
        rows: of ROWS, for the plugin; empty: numbers.
    """
    sizes = "" if form == "original" else f"-{rank}-{rope_dim}" + (f"-nope-{nope_dim}" if nope_dim else "")
    folder = out / f"{shape}-{form}{sizes}{rows and '-' + rows}"
    folder.mkdir(parents=True, exist_ok=True)
    if form == "portable":
        content = portable(SHAPES[shape], rank, rope_dim, nope_dim)
    else:
        config = shape_config(SHAPES[shape])
        config.architectures = ["LlamaForCausalLM"]
        if form == "plugin":
            config = converted_config(config, rank, rope_dim, nope_dim=nope_dim)
            config.architectures = ["MlaLlamaForCausalLM"]
            config.latent_cache = ROWS.get(rows)
        content = config.to_dict() | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(content, indent=1))
    return folder
