"""RoPE settings of a GGUF file: base, width and scaling from its metadata, factors on each frequency from tensors."""

from __future__ import annotations

from math import log, pi
from typing import Any

import torch
from transformers import PreTrainedConfig

from mla_convert.core.errors import InputError
from mla_convert.source.checkpoint.gguf_file import GgufFile

# Factors that divide each frequency: one set (Llama 3.1 and later), or one for long and one for short text (Phi-3).
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
BASE, LOCAL_BASE, WIDTH = "rope.freq_base", "rope.freq_base_swa", "rope.dimension_count"
TYPE, FACTOR, ORIGINAL = "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"
OLD_FACTOR, ATTENTION, YARN_ATTENTION = "rope.scale_linear", "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"
# Begin and end of YaRN's ramp, and its share, which is 1 in transformers.
RAMP = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}
SHARE = "rope.scaling.yarn_ext_factor"
KEYS = (BASE, LOCAL_BASE, WIDTH, TYPE, FACTOR, ORIGINAL, OLD_FACTOR, ATTENTION, YARN_ATTENTION, SHARE, *RAMP)
# Families whose RoPE may rotate only a part of a head.
PARTIAL = ("phi3", "stablelm")
# Llama 3.1's scaling: the settings that all of its checkpoints share.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_CONTEXT = 8192


def set_rope(config: PreTrainedConfig, file: GgufFile, said: dict[str, Any]) -> tuple[str, ...]:
    """Set RoPE's settings in the configuration. Returns the metadata keys that were applied.

    Args:
        config: to change.
        file: for messages, and for tensors with factors.
        said: metadata of the architecture, by keys without its name.

    Raises:
        InputError: RoPE that transformers' class does not support, or contradictory settings.
    """
    given = {key: said[key] for key in KEYS if key in said}
    if getattr(config, "rope_parameters", None) is None:  # learned positions
        return ()
    for key, value in given.items():
        if key != TYPE and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf")
        ):
            raise InputError(
                f"{file.name} has {file.architecture}.{key} = {value!r}, which is no number: fetch it again"
            )
        if key in (BASE, WIDTH) and not value:
            raise InputError(f"{file.name} has {file.architecture}.{key} = 0: fetch it again")
    by_layer = config.rope_parameters.get("full_attention")
    main = dict(by_layer or config.rope_parameters)
    # Of what transformers made of the file only base and width stay: scaling is set anew below.
    main = {key: main[key] for key in ("rope_theta", "partial_rotary_factor") if key in main} | {"rope_type": "default"}
    if given.get(BASE):
        main["rope_theta"] = float(given[BASE])
    main |= _width(config, file, given)
    main |= _scaling(config, file, given, main)
    if not by_layer:
        if given.get(LOCAL_BASE):
            raise _unknown(file, LOCAL_BASE, given[LOCAL_BASE])
        config.rope_parameters = main
        return KEYS
    local = dict(config.rope_parameters["sliding_attention"])
    if given.get(LOCAL_BASE):
        local["rope_theta"] = float(given[LOCAL_BASE])
    config.rope_parameters = {"full_attention": main, "sliding_attention": local}
    return KEYS


def _unknown(file: GgufFile, key: str, value: Any) -> InputError:
    return InputError(
        f"{file.name} has {file.architecture}.{key} = {value!r}, RoPE that transformers' class does not have: give the "
        f"checkpoint that it was made from"
    )


def head_dim(config: PreTrainedConfig) -> int:
    """Width of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _width(config: PreTrainedConfig, file: GgufFile, given: dict[str, Any]) -> dict[str, float]:
    """The fraction of a head that RoPE rotates, as a setting."""
    width, head = int(given.get(WIDTH) or head_dim(config)), head_dim(config)
    if config.model_type in PARTIAL:
        # transformers' default is that of one particular checkpoint
        return {"partial_rotary_factor": width / head}
    if width != head:
        raise _unknown(file, WIDTH, width)
    return {}


def _scaling(config: PreTrainedConfig, file: GgufFile, given: dict[str, Any], main: dict[str, Any]) -> dict[str, Any]:
    """The scaling, as entries of `rope_parameters`."""
    kind = given.get(TYPE)
    factor = given.get(FACTOR) or given.get(OLD_FACTOR) or 0.0
    if kind is None:  # llama.cpp's rule
        kind = "linear" if factor not in (0.0, 1.0) else "none"
    if kind == "linear" and factor in (0.0, 1.0):
        kind = "none"
    tensors = [name for name in FACTORS if name in file.tensors]
    width = int(head_dim(config) * main.get("partial_rotary_factor", 1.0))
    if tensors:
        if kind not in ("none", "longrope", "su") or "full_attention" in (config.rope_parameters or {}):
            raise InputError(
                f"{file.name} has tensor {tensors[0]} beside RoPE scaling of type {kind!r}: it is not read"
            )
        factors = {name: _factors(file, name, width) for name in tensors}
        return _by_factors(config, file, given, factors, main["rope_theta"])
    if kind == "none":
        _refuse(file, given, ATTENTION, YARN_ATTENTION, SHARE)
        return {}
    if kind == "linear":
        _refuse(file, given, ATTENTION, YARN_ATTENTION, SHARE)
        return {"rope_type": "linear", "factor": float(factor)}
    if kind != "yarn" or factor < 1:
        raise _unknown(file, TYPE, f"{kind}, factor {factor}")
    return _yarn(config, file, given, float(factor))


def _refuse(file: GgufFile, given: dict[str, Any], *keys: str) -> None:
    """Refuse factors other than 1 that this kind of scaling does not have."""
    for key in keys:
        if given.get(key) not in (None, 0.0, 1.0):
            raise _unknown(file, key, given[key])


def _yarn(config: PreTrainedConfig, file: GgufFile, given: dict[str, Any], factor: float) -> dict[str, Any]:
    _refuse(file, given, SHARE)
    settings: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    # llama.cpp's default is the context length
    settings["original_max_position_embeddings"] = int(given.get(ORIGINAL) or config.max_position_embeddings)
    settings |= {name: float(given[key]) for key, name in RAMP.items() if given.get(key)}
    attention = float(given.get(ATTENTION) or 1.0) * float(given.get(YARN_ATTENTION) or 1.0)
    if attention != 1.0:
        # llama.cpp multiplies these by YaRN's own factor, 1 + 0.1 ln(factor); transformers takes the product.
        settings["attention_factor"] = attention * (1 + 0.1 * log(factor))
    return settings


def _factors(file: GgufFile, name: str, width: int) -> list[float]:
    factors = file.numbers(name)
    if len(factors) != width // 2 or not all(0 < factor < float("inf") for factor in factors):
        raise InputError(
            f"tensor {name} of {file.name} does not hold a factor for each of {width // 2} frequencies: fetch it again"
        )
    return factors


def _by_factors(
    config: PreTrainedConfig, file: GgufFile, given: dict[str, Any], factors: dict[str, list[float]], theta: float
) -> dict[str, Any]:
    """Scaling by a factor on each frequency: LongRoPE, or Llama 3's if the factors are those of it."""
    single, long, short = (factors.get(name) for name in FACTORS)
    original = int(given.get(ORIGINAL) or 0)
    if single and not (long or short):
        if all(factor == 1.0 for factor in single):
            return {}
        # The file holds the factors alone. The known original context is tried first, then the one that the file
        # states.
        for context in (LLAMA3_CONTEXT, original):
            # The slowest frequencies are divided by the whole factor, so that the largest entry is it.
            known = {"factor": max(single), **LLAMA3, "original_max_position_embeddings": context}
            if context and _same(_llama3(theta, len(single), known), single):
                return {"rope_type": "llama3", **known}
        # Any other factors are LongRoPE without a difference between long and short text.
        return {"rope_type": "longrope", "short_factor": single, "long_factor": single, "attention_factor": 1.0,
                "original_max_position_embeddings": config.max_position_embeddings}  # fmt: skip
    if single or not long or not short:
        lacking = next(name for name in FACTORS[1:] if name not in factors or single)
        raise InputError(
            f"{file.name} has {', '.join(factors)} for RoPE and not only the pair with {lacking}: it is not read"
        )
    _refuse(file, given, YARN_ATTENTION, SHARE)
    if not original:
        raise InputError(
            f"{file.name} has tensor {FACTORS[1]} and no {file.architecture}.{ORIGINAL}: fetch a newer version of it"
        )
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = original
    settings = {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": original,
    }
    # without it, transformers uses LongRoPE's own attention factor for this ratio of contexts
    return settings | ({"attention_factor": float(given[ATTENTION])} if given.get(ATTENTION) else {})


def _llama3(theta: float, count: int, known: dict[str, float]) -> list[float]:
    """Llama 3's factor on each frequency (transformers' rope type "llama3")."""
    low, high = known["low_freq_factor"], known["high_freq_factor"]
    frequencies = theta ** -(torch.arange(count, dtype=torch.float64) / count)
    turns = known["original_max_position_embeddings"] * frequencies / (2 * pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / known["factor"] + share)).tolist()


def _same(one: list[float], other: list[float]) -> bool:
    """Whether factors are equal to float32's precision."""
    return all(abs(a / b - 1) < 1e-5 for a, b in zip(one, other, strict=True))
