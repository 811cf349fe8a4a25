"""config.json of an exported model: DeepSeek-V3's, with every layer dense."""

from __future__ import annotations

from typing import Any

from mla_convert.publish.engines.padding import Sizes
from mla_convert.publish.engines.profiles import Profile
from mla_convert.source.load_model import EXPORTED
from mla_convert.version import __version__

STOCK_CLASS = "DeepseekV3ForCausalLM"
CODE_CLASS, MODEL_CLASS = "MlaServedForCausalLM", "MlaServedModel"
CODE_FILE = "modeling_mla_served.py"
# Added to the vocabulary's size: transformers' stock class stops at a padding token outside the vocabulary.
GUARD = 1


def served_config(
    config: Any, profile: Profile, sizes: Sizes, dtype: str, theta: float, eps: float, gguf: bool
) -> dict[str, Any]:
    """The configuration of an exported model, from the converted one's.

    DeepSeek's classes insist on experts: a few are named, and no layer has any. `pad_token_id` lies outside the vocabulary
    in the profiles that transformers' own class would misread: it refuses to build the model, and engines ignore it.
    """
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    guarded = profile != "portable"
    return {
        "architectures": [CODE_CLASS if profile == "hf-code" else STOCK_CLASS],
        "model_type": "deepseek_v3",
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": eps,
        "initializer_range": config.initializer_range,
        "use_cache": True,
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.vocab_size + GUARD if guarded else config.pad_token_id,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "kv_lora_rank": sizes.rank,
        # llama.cpp asks for the number, everybody else for none
        "q_lora_rank": 0 if gguf else None,
        "qk_rope_head_dim": sizes.rope_dim,
        "qk_nope_head_dim": sizes.nope_dim,
        "v_head_dim": sizes.v_dim,
        "rope_interleave": True,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "first_k_dense_replace": layers,
        "moe_layer_freq": 1,
        "moe_intermediate_size": config.intermediate_size,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
        EXPORTED: {"profile": profile, "version": __version__},
    }
