"""The models that each export profile supports, and the reasons for which others are refused (table: docs/guides/serve.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from mla_convert.core.errors import InputError, UsageError

Profile = Literal["portable", "engine", "hf-code"]
PROFILES: tuple[Profile, ...] = ("portable", "engine", "hf-code")
# Families whose decoder layer is DeepSeek's except for attention: RMSNorm, attention, RMSNorm, gated MLP.
FAMILIES = ("llama", "mistral", "qwen2", "smollm3")
# The same with norms on queries and keys, which profile hf-code supports.
NORMED_FAMILIES = ("qwen3",)
# RoPE scalings whose frequencies depend on the length of the text.
MOVING = ("dynamic", "longrope")
# Epsilon of DeepSeek-V3's latent norm in transformers, which ignores config.json; vLLM and SGLang use rms_norm_eps.
STOCK_EPS = 1e-6


def check_profile(profile: str) -> Profile:
    """The profile of that name.

    Raises:
        UsageError: there is none.
    """
    if profile not in PROFILES:
        raise UsageError(f"profile {profile!r} is none of {', '.join(PROFILES)}")
    return profile


@dataclass(frozen=True)
class ModelTraits:
    """RoPE and softmax scale of a converted model, from its configuration and modules."""

    theta: float
    inv_freq: tuple[float, ...]
    rope_scale: float
    softmax_scale: float


def check_family(config: Any, family: str, label: str) -> None:
    """Refuse a model that no profile supports.

    Args:
        config: of the model, converted or not.
        family: model type of the original.
        label: of the model, for messages.

    Raises:
        InputError: the first reason.
    """
    if family not in FAMILIES + NORMED_FAMILIES:
        raise InputError(
            f"{label} is of family {family}, whose decoder is not DeepSeek's (those of "
            f"{', '.join(FAMILIES + NORMED_FAMILIES)} are): serve it with transformers"
        )
    _check_decoder(config, label, family)
    if rope_type(config) in MOVING:
        raise InputError(
            f"{label} has RoPE of type {rope_type(config)}, whose frequencies depend on the length of the text, which no "
            f"engine's MLA can have: serve it with transformers"
        )


def rope_type(config: Any) -> str:
    """The type of a model's RoPE scaling; "default": none."""
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")


def needs_code(config: Any, biases: bool, normed: bool) -> str | None:
    """The first reason for which a model needs profile hf-code; None if it does not."""
    if normed:
        return "norms on queries and keys, which DeepSeek's attention has not"
    if biases:
        return "biases in its attention, which engines drop without a word"
    if rope_type(config) != "default":
        return f"RoPE of type {rope_type(config)}, which engines take for DeepSeek's yarn"
    return None


def check_profile_of(profile: Profile, reason: str | None, label: str) -> None:
    """Refuse a profile without code if `reason`, from `needs_code`, requires it.

    Raises:
        InputError: names profile hf-code.
    """
    if reason and profile != "hf-code":
        raise InputError(f"{label} has {reason}: export it with --profile hf-code")


def _check_decoder(config: Any, label: str, family: str) -> None:
    if config.hidden_act != "silu":
        raise InputError(
            f"{label} has the activation {config.hidden_act}, and vLLM's DeepSeek knows silu only: serve it with transformers"
        )
    types = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    # Mistral's window holds for all layers where its configuration lists no types.
    sliding = "sliding_attention" in types or (family == "mistral" and window and not types)
    if sliding and window and window < config.max_position_embeddings:
        raise InputError(
            f"{label} has a sliding window of {window}, which DeepSeek's attention has not: serve it with transformers"
        )


def check_dtype(stored: str, wanted: str) -> str:
    """Name of the dtype to write.

    Raises:
        InputError: float16, in which the scaled latent underflows.
    """
    dtype = stored if wanted == "auto" else wanted
    if dtype not in ("float32", "bfloat16"):
        raise InputError(
            f"{dtype} cannot hold what an exported model needs (its latents underflow): give --dtype bfloat16 or float32"
        )
    return dtype


def residual_scale(profile: Profile, eps: float, largest: float) -> tuple[float, float]:
    """Factor on the residual stream, and rms_norm_eps of the exported model; together they leave the results unchanged.

    portable: rms_norm_eps must be that of transformers. engine: the factor is a power of two, large enough that latents need
    little scaling, and small enough that the largest scaled weight fits float16 (the scales of GGUF).

    Args:
        profile: of the export.
        eps: rms_norm_eps of the converted model.
        largest: largest magnitude of the weights that the factor multiplies.
    """
    # An RMSNorm with epsilon s² eps gives for s x what one with eps gives for x.
    if profile == "portable":
        return math.sqrt(STOCK_EPS / eps), STOCK_EPS
    if profile == "hf-code":
        return 1.0, eps
    # 32768 is the largest power of two below float16's limit, 65504.
    power = min(18, math.floor(math.log2(32768 / max(largest, 1e-30))))
    return 2.0**power, eps * 4.0**power
