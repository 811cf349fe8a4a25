"""What an exported model can say, profile by profile, and what is refused with the reason. docs/guides/serve.md has the table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from mla_convert.core.errors import InputError, UsageError

Profile = Literal["portable", "engine", "hf-code"]
PROFILES: tuple[Profile, ...] = ("portable", "engine", "hf-code")
# Families whose decoder layer is DeepSeek's but for its attention: RMSNorm, attention, RMSNorm, gated MLP.
FAMILIES = ("llama", "mistral", "qwen2", "smollm3")
# The same, with norms on queries and keys: profile hf-code says them.
NORMED_FAMILIES = ("qwen3",)
# RoPE scalings whose frequencies depend on the length of the text.
MOVING = ("dynamic", "longrope")
# DeepSeek-V3's own latent norm adds this in transformers, whatever config.json says; vLLM and SGLang add rms_norm_eps.
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
    """What the exporter asks of a converted model's configuration and modules."""

    theta: float
    inv_freq: tuple[float, ...]
    rope_scale: float
    softmax_scale: float


def check_family(config: Any, family: str, label: str) -> None:
    """Refuse a model that DeepSeek-V3's form cannot say in any profile.

    :param config: of the model, converted or not; `family` is the original's model type.

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
    """How a model's RoPE is scaled; "default" is not at all."""
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")


def needs_code(config: Any, biases: bool, normed: bool) -> str | None:
    """The first reason why a model needs profile hf-code, with what engines make of it; None if it does not."""
    if normed:
        return "norms on queries and keys, which DeepSeek's attention has not"
    if biases:
        return "biases in its attention, which engines drop without a word"
    if rope_type(config) != "default":
        return f"RoPE of type {rope_type(config)}, which engines take for DeepSeek's yarn"
    return None


def check_profile_of(profile: Profile, reason: str | None, label: str) -> None:
    """Refuse profiles without code to a model that needs some, by `needs_code`.

    Raises:
        InputError: with the way out.
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
    """Factor on the residual stream, and rms_norm_eps of the exported model, which together change nothing.

    portable: rms_norm_eps must be transformers' own; engine: a power of two, so large that latents need little scaling
    beside it, and so small that `largest`, the largest weight that it multiplies, stays within float16 (GGUF's scales).
    """
    if profile == "portable":
        return math.sqrt(STOCK_EPS / eps), STOCK_EPS
    if profile == "hf-code":
        return 1.0, eps
    power = min(18, math.floor(math.log2(32768 / max(largest, 1e-30))))
    return 2.0**power, eps * 4.0**power
