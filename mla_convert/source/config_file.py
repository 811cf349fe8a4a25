"""Reads and checks config.json before transformers does: a JSON object with plausible sizes. Imports no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mla_convert.core.errors import InputError, one_line
from mla_convert.core.words import plain

# Largest plausible values, at least ten times those of any model. With larger ones, transformers takes minutes, or more memory
# than there is, before it fails.
SIZES = {
    "layers": 1024,
    "width": 1 << 20,
    "heads": 1 << 14,
    "head width": 1 << 16,
    "experts": 1 << 15,
    "vocabulary": 1 << 26,
    "context": 1 << 40,
}
# Each size's keys in the configurations of all families.
KEYS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "max_window_layers"), "layers"),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "hidden_dim", "ffn_dim", "n_inner",
                     "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "kv_lora_rank",
                     "ffn_hidden_size", "intermediate_size_mlp", "prefix_dense_intermediate_size",
                     "shared_intermediate_size"), "width"),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "num_heads", "n_heads", "num_kv_heads"), "heads"),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "qk_head_dim", "rotary_dim"), "head width"),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "moe_num_experts",
                     "moe_num_shared_experts", "num_shared_experts"), "experts"),
    "vocab_size": "vocabulary",
    **dict.fromkeys(("max_position_embeddings", "n_positions", "sliding_window", "n_ctx", "attention_chunk_size"), "context"),
}  # fmt: skip
# Sizes of the language model that no model has below 1.
POSITIVE = ("num_hidden_layers", "n_layer", "hidden_size", "n_embd", "num_attention_heads", "n_head", "vocab_size")
MOST_TOKEN = 1 << 31
# Largest length of a list with one entry per layer.
PER_LAYER = 64 * SIZES["layers"]
# Largest plausible number of parameters, estimated as layers × width² × experts.
LARGEST = 1e15


def read_config(folder: Path, label: str) -> dict[str, Any]:
    """The content of a folder's config.json, after `check_sizes`.

    Raises:
        InputError: it is missing, no JSON object, or has implausible sizes.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{label} has no config.json: give a folder that holds a transformers checkpoint")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"config.json of {label} is not a JSON object ({one_line(error)}): fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(
            f"config.json of {label} is not a JSON object (but a {type(content).__name__}): fetch it again"
        )
    check_sizes(content, label)
    for key in POSITIVE:
        value = language_model(content).get(key)
        if isinstance(value, int | float) and value < 1:
            raise InputError(f"config.json of {label} has {key} = {value}: it is damaged; fetch it again")
    return content


def language_model(content: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that describes the language model: of a multimodal model, its `text_config`."""
    text = content.get("text_config")
    return text if isinstance(text, dict) else content


def check_sizes(content: dict[str, Any], label: str) -> None:
    """Refuse implausible sizes in a configuration or in a part of one.

    Raises:
        InputError: names the key and the largest plausible value.
    """
    for key, value in content.items():
        if isinstance(value, dict):
            check_sizes(value, label)
        elif isinstance(value, list) and len(value) > PER_LAYER:
            raise InputError(f"config.json of {label} has {len(value)} entries in {plain(key)}: no model has this many")
        elif key.endswith("_token_id") and isinstance(value, int) and abs(value) > MOST_TOKEN:
            raise InputError(
                f"config.json of {label} has {plain(key)} = {_shown(value)}, which is no token: fetch it again"
            )
        elif key in KEYS and isinstance(value, int | float) and not isinstance(value, bool):
            _check(key, value, label)
    _check_whole(content, label)


def _check(key: str, value: float, label: str) -> None:
    most = SIZES[KEYS[key]]
    # NaN is above no limit, and negative infinity is below every one.
    if value > most or value != value or value == -math.inf:
        raise InputError(
            f"config.json of {label} has {key} = {_shown(value)}, and at most {most} are believed: it is damaged; fetch it again"
        )


def _shown(value: float) -> str:
    """A number of any size, in a few digits."""
    # str() refuses integers of more than 4300 digits, and float() those beyond its range.
    return str(value) if abs(value) < 1e15 else f"{float(max(min(value, 10**300), -(10**300))):.3g}"


def _check_whole(content: dict[str, Any], label: str) -> None:
    """Refuse sizes that are plausible one by one, but together describe a model that no machine holds."""
    largest = dict.fromkeys(SIZES, 1.0)
    for key, value in content.items():
        if key in KEYS and isinstance(value, int) and value > 0:
            largest[KEYS[key]] = max(largest[KEYS[key]], float(value))
    count = largest["layers"] * largest["width"] ** 2 * largest["experts"]
    if count > LARGEST:
        raise InputError(
            f"config.json of {label} describes a model of about {count:.0e} parameters: it is damaged; fetch it again"
        )
