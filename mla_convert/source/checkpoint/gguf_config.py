"""Transfer of a GGUF file's metadata into the configuration that transformers makes of the file.

transformers reads a part of the metadata and silently leaves the rest at its defaults: RoPE scaling, the width that RoPE
rotates, sliding windows, soft caps. Here every key of the architecture is either applied or refused by name. The keys:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; their meaning: llama.cpp's src/llama-model.cpp.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mla_convert.core.errors import InputError
from mla_convert.source.checkpoint.gguf_file import GgufFile
from mla_convert.source.checkpoint.gguf_rope import head_dim, set_rope

# Metadata key -> names of the setting, of which a configuration has one. Counts are integers from 1.
COUNTS = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "feed_forward_length": ("n_inner", "intermediate_size"),
    "vocab_size": ("vocab_size",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
NUMBERS = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "norm_epsilon", "layer_norm_epsilon"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
# Without these keys, transformers uses the tokens of one particular checkpoint.
TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
# Recommended generation settings -> their names in transformers.
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
# Keys that are applied below, and keys without effect on the model's results.
HEAD = ("attention.key_length", "attention.value_length", "rope.dimension_count")
WINDOW = ("attention.sliding_window", "attention.sliding_window_pattern")
SCALE = "attention.scale"
HARMLESS = ("tensor_data_layout", "use_parallel_residual", "rope.scaling.finetuned", "attention.causal")
# Families whose sliding window the metadata sets, and those of them that require one.
WINDOWED = ("mistral", "phi3", "starcoder2", "gemma2", "gemma3_text", "gpt_oss")
ALWAYS_WINDOWED = ("gemma3_text", "gpt_oss")
# Layers of the 27B models; llama.cpp recognises by them that the softmax scale is not that of the heads.
SCALED_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}


def apply_metadata(config: PreTrainedConfig, file: GgufFile) -> list[str]:
    """Apply a file's metadata to `config`, which transformers made of the file. Returns notes.

    Raises:
        InputError: a key that the configuration does not have, or of the wrong type.
    """
    start = f"{file.architecture}."
    said = {key.removeprefix(start): value for key, value in file.metadata.items() if key.startswith(start)}
    for key, names in COUNTS.items():
        if key in said:
            _set(config, file, key, names, _count(said[key], file, key))
    for key, names in NUMBERS.items():
        if key in said:
            _set(config, file, key, names, _number(said[key], file, key))
    for key, name in TOKENS.items():
        setattr(config, name, file.metadata.get(f"tokenizer.ggml.{key}"))
    _set_heads(config, file, said)
    notes = _set_window(config, file, said) + _set_scale(config, file, said) + _context_note(config, file, said)
    _set_biases(config, file)
    known = {*COUNTS, *NUMBERS, *HEAD, *WINDOW, SCALE, *HARMLESS, *set_rope(config, file, said)}
    for key, value in said.items():
        # A value of 0, False or none switches its feature off, and so changes nothing.
        if key not in known and value:
            raise InputError(
                f"{file.name} has {start}{key} = {value!r}, which transformers does not read and this conversion does not know: "
                f"give the checkpoint that it was made from"
            )
    return notes


def _count(value: Any, file: GgufFile, key: str) -> int:
    # counts of experts may be 0: a model without experts
    if not isinstance(value, int) or isinstance(value, bool) or value < 0 or (not value and "expert" not in key):
        raise InputError(
            f"{file.name} has {file.architecture}.{key} = {value!r}, which is no number from 1: fetch it again"
        )
    return value


def _number(value: Any, file: GgufFile, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise InputError(f"{file.name} has {file.architecture}.{key} = {value!r}, which is no number: fetch it again")
    return float(value)


def _set(config: PreTrainedConfig, file: GgufFile, key: str, names: tuple[str, ...], value: float) -> None:
    """Set the configuration's setting that has one of these names."""
    for name in names:
        if hasattr(config, name):
            setattr(config, name, value)
            return
    if key == "attention.head_count_kv" and value == config.num_attention_heads:
        return  # families without grouped-query attention
    if value:
        raise InputError(
            f"{file.name} has {file.architecture}.{key} = {value}, which a {config.model_type} model of transformers does not "
            f"have: give the checkpoint that it was made from"
        )


def _set_heads(config: PreTrainedConfig, file: GgufFile, said: dict[str, Any]) -> None:
    """Set the width of a head."""
    sizes = [_count(said[key], file, key) if key in said else None for key in HEAD]
    key_length, value_length, rotary = sizes
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if config.num_attention_heads % groups:
        raise InputError(
            f"{file.name} has {config.num_attention_heads} query heads and {groups} key/value heads: fetch it again"
        )
    share = config.hidden_size // config.num_attention_heads
    # older files of the llama architecture state the width of a head only as that of RoPE
    width = key_length or (rotary if file.architecture == "llama" else None) or share
    if value_length not in (None, width):
        raise InputError(
            f"{file.name} has {file.architecture}.attention.value_length = {value_length} beside keys of {width}: heads of two "
            f"widths are not supported"
        )
    if width != (getattr(config, "head_dim", None) or share):
        config.head_dim = width


def _context_note(config: PreTrainedConfig, file: GgufFile, said: dict[str, Any]) -> list[str]:
    """A note where the file does not say how long texts may be."""
    if "context_length" in said or not getattr(config, "max_position_embeddings", None):
        return []
    return [
        f"{file.name} does not say its context ({file.architecture}.context_length): taken as {config.max_position_embeddings} "
        f"tokens, transformers' default for {config.model_type}"
    ]


def _set_window(config: PreTrainedConfig, file: GgufFile, said: dict[str, Any]) -> list[str]:
    """Set the sliding window and the layers that have one. Returns notes."""
    key, pattern_key = (f"{file.architecture}.{name}" for name in WINDOW)
    window, pattern = (said.get(name) for name in WINDOW)
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 0):
        raise InputError(f"{file.name} has {key} = {window!r}, which is no number: fetch it again")
    if config.model_type not in WINDOWED:
        if window or pattern:
            key, value = (key, window) if window else (pattern_key, pattern)
            raise InputError(
                f"{file.name} has {key} = {value!r}, and a {config.model_type} model of transformers has no window: give the "
                f"checkpoint that it was made from"
            )
        return []
    if not window and config.model_type in ALWAYS_WINDOWED:
        raise InputError(f"{file.name} does not say its attention window ({key}): fetch a newer version of it")
    if window or config.model_type != "gemma2":  # the default of Gemma 2's configuration is right
        config.sliding_window = window or None
    if pattern:
        config.layer_types = _layer_types(pattern, config.num_hidden_layers, file, pattern_key)
    if config.model_type in ("starcoder2", "mistral") and window is None:
        return [f"{file.name} says of no attention window ({key}): none is taken"]
    return []


def _layer_types(pattern: Any, layers: int, file: GgufFile, key: str) -> list[str]:
    """`layer_types` from a list of flags, or from a period: the last layer of each period has no window."""
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
        pattern = [bool((index + 1) % pattern) for index in range(layers)]
    if not isinstance(pattern, list) or len(pattern) != layers:
        raise InputError(f"{file.name} has {key} = {pattern!r}, which does not fit its {layers} layers: fetch it again")
    return ["sliding_attention" if windowed else "full_attention" for windowed in pattern]


def _set_scale(config: PreTrainedConfig, file: GgufFile, said: dict[str, Any]) -> list[str]:
    """Set the softmax scale. Returns notes."""
    scale = _number(said[SCALE], file, SCALE) if SCALE in said else 0.0
    has_own = hasattr(config, "query_pre_attn_scalar")
    if scale and has_own:
        scalar = round(scale**-2)  # the configuration has an integer
        if not scalar or abs(scale * scalar**0.5 - 1) > 1e-5:
            raise InputError(
                f"{file.name} has {file.architecture}.{SCALE} = {scale}, which is 1/sqrt of no whole number, as transformers "
                f"needs it: give the checkpoint that it was made from"
            )
        config.query_pre_attn_scalar = scalar
    elif scale and abs(scale * head_dim(config) ** 0.5 - 1) > 1e-4:
        raise InputError(
            f"{file.name} has {file.architecture}.{SCALE} = {scale}, and a {config.model_type} model of transformers has the "
            f"scale of its heads: give the checkpoint that it was made from"
        )
    elif has_own and SCALED_BY_WIDTH.get(config.model_type) == config.num_hidden_layers:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    elif has_own and config.query_pre_attn_scalar != head_dim(config):
        scalar = config.query_pre_attn_scalar
        return [
            f"{file.name} does not say the scale of its attention ({file.architecture}.{SCALE}): taken as 1/sqrt({scalar}), as "
            f"transformers does, though its heads have {head_dim(config)} dims"
        ]
    return []


def _set_biases(config: PreTrainedConfig, file: GgufFile) -> None:
    """Set the flags for biases: true if the first layer's projections have them."""
    # A file whose other layers differ from the first one is refused later: its tensors are not the model's.
    for setting, names in (("attention_bias", ("attn_q", "attn_k", "attn_v")), ("mlp_bias", ("ffn_up",))):
        if hasattr(config, setting):
            setattr(config, setting, any(f"blk.0.{name}.bias" in file.tensors for name in names))


def sampling(file: GgufFile) -> dict[str, Any]:
    """The generation settings that a file recommends, by transformers' names.

    Raises:
        InputError: a setting that is no number.
    """
    settings: dict[str, Any] = {}
    for key, name in SAMPLING.items():
        value = file.metadata.get(f"general.sampling.{key}")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise InputError(f"{file.name} has general.sampling.{key} = {value!r}, which is no number: fetch it again")
        settings[name] = value
    # a temperature of 0 means greedy decoding
    greedy = settings.get("temperature") == 0
    return {"do_sample": False} if greedy else settings and {"do_sample": True, **settings}
