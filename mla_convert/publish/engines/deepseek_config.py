"""config.json of an exported model: DeepSeek-V3's configuration with every layer dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mla_convert.publish.engines.padding import Sizes
from mla_convert.publish.engines.profiles import Profile
from mla_convert.source.load_model import EXPORTED
from mla_convert.version import __version__

STOCK_CLASS = "DeepseekV3ForCausalLM"
CODE_CLASS, MODEL_CLASS = "MlaServedForCausalLM", "MlaServedModel"
CODE_FILE = "modeling_mla_served.py"
# Distance of the padding token from the end of the vocabulary; transformers' stock class refuses such a token.
GUARD = 1


@dataclass(frozen=True)
class ServedForm:
    """The properties of an exported model that its converted configuration does not determine.

    `dtype`: name of the stored dtype; `theta`: base of the RoPE table; `eps`: rms_norm_eps; `gguf`: whether config.json is
    for llama.cpp's converter.
    """

    profile: Profile
    sizes: Sizes
    dtype: str
    theta: float
    eps: float
    gguf: bool = False


def served_config(config: Any, form: ServedForm) -> dict[str, Any]:
    """The configuration of an exported model, from the converted one's.

    DeepSeek's classes require experts: a few are configured, and no layer has any. `pad_token_id` is outside the vocabulary
    in the profiles that transformers' own class would misread: that class then refuses to build the model, and engines
    ignore the token.
    """
    layers, heads, sizes = config.num_hidden_layers, config.num_attention_heads, form.sizes
    guarded = form.profile != "portable"
    return {
        "architectures": [CODE_CLASS if form.profile == "hf-code" else STOCK_CLASS],
        "model_type": "deepseek_v3",
        "dtype": form.dtype,
        # The older name of `dtype`.
        "torch_dtype": form.dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": form.eps,
        "initializer_range": config.initializer_range,
        "use_cache": True,
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.vocab_size + GUARD if guarded else config.pad_token_id,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "kv_lora_rank": sizes.rank,
        # llama.cpp requires a number, the others None
        "q_lora_rank": 0 if form.gguf else None,
        "qk_rope_head_dim": sizes.rope_dim,
        "qk_nope_head_dim": sizes.nope_dim,
        "v_head_dim": sizes.v_dim,
        "rope_interleave": True,
        "rope_theta": form.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": form.theta},
        # Layers before this index are dense: all of them.
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
        EXPORTED: {"profile": form.profile, "version": __version__},
    }
