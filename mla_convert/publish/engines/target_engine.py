"""Settings of a conversion that aims at an engine: sizes that it has kernels for, planes that it can express."""

from __future__ import annotations

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.settings import ConvertConfig
from mla_convert.method.factorise.sizes import make_plan, shares_out
from mla_convert.publish.engines.padding import KNOWN, RANKS, ROPE_DIM, padded
from mla_convert.publish.engines.profiles import Profile, check_dtype, check_family, check_profile_of, needs_code
from mla_convert.source.source import Source

# Without a size given: the largest that keeps no more than this share of the cache.
SHARE = 0.6


def apply_constraints(config: ConvertConfig, source: Source) -> ConvertConfig:
    """The settings with everything that `engine` decides; unchanged without one.

    Sizes are uniform. Planes are those of one table for all layers where the source can be exported without code, and free
    where profile hf-code is needed anyway (biases, a RoPE scaling), which keeps every layer's own.

    Raises:
        UsageError: a setting that the engine has no kernel for.
        InputError: a source that it cannot serve, or that it has no size for.
    """
    if config.engine is None:
        return config
    engine, shape = config.engine, source.shape
    check_family(source.config, source.family.model_type, source.name)
    reason = _reason(source)
    if reason and engine != "vllm":
        raise InputError(
            f"{source.name} has {reason}, and {engine} runs no code of a model's: serve it with vLLM or transformers"
        )
    planes = config.planes if "planes" in config.model_fields_set else "loss" if reason else "table"
    if planes == "even" or (planes == "loss" and engine != "vllm"):
        raise UsageError(f"--planes {planes} is nothing that {engine} can express: give table, or leave it out")
    widest = shape.head_dim if planes == "table" else shape.full_rope_dim
    rope_dim = min(ROPE_DIM, widest) if config.rope_dim is None else config.rope_dim
    if rope_dim == "full" or rope_dim > ROPE_DIM:
        raise UsageError(f"--rope-dim {rope_dim} is not possible with --for {engine}: give at most {ROPE_DIM}")
    changed = {"engine": None, "uniform": True, "planes": planes, "rope_dim": rope_dim, "kv_ratio": None}
    return config.model_copy(update=changed | {"rank": _rank(config, source, rope_dim)})


def check_export(config: ConvertConfig, profile: Profile, source: Source) -> None:
    """Refuse, before a conversion, to export its outcome where that is not possible with any outcome.

    Raises:
        UsageError: settings that the profile cannot say.
        InputError: a source that it cannot say.
    """
    config = apply_constraints(config, source)
    check_family(source.config, source.family.model_type, source.name)
    check_profile_of(profile, _reason(source), source.name)
    plan = make_plan(config, source.shape)
    if shares_out(config, plan):
        raise UsageError("--export needs one size for all layers: add --for ENGINE, or --uniform")
    if profile != "hf-code" and config.planes == "loss" and plan.rope_dim:
        raise UsageError(f"--export {profile} needs planes of one table: add --for ENGINE, or --planes table")
    padded([plan.rank], plan.rope_dim, plan.qk_nope_head_dim, source.shape.head_dim, "auto")
    stored = str(source.dtype).removeprefix("torch.")
    check_dtype(stored if config.dtype == "auto" else config.dtype, "auto")


def _reason(source: Source) -> str | None:
    return needs_code(source.config, any(source.has_bias(letter) for letter in "qkvo"), source.shape.normed)


def _rank(config: ConvertConfig, source: Source, rope_dim: int) -> int:
    """The rank given, if the engine has kernels for it, or the largest within the share of the cache to keep."""
    engine, cache = config.engine, source.shape.cache_width
    if config.rank is not None:
        if config.rank == "full" or (engine == "vllm" and config.rank not in RANKS) or config.rank > RANKS[-1]:
            which = KNOWN if engine == "vllm" else f"at most {RANKS[-1]}"
            raise UsageError(
                f"--rank {config.rank} is not possible with --for {engine}: give {which.replace(' and ', ' or ')}"
            )
        return config.rank
    share = SHARE if config.kv_ratio is None else config.kv_ratio
    if engine != "vllm":
        return max(16, min(RANKS[-1], int(share * cache - rope_dim) // 16 * 16))
    largest = source.shape.full_rank(rope_dim)
    fitting = [rank for rank in RANKS if rank <= largest and rank + ROPE_DIM <= share * cache]
    if not fitting and config.kv_ratio is None:
        fitting = [rank for rank in RANKS[:1] if rank <= largest and rank + ROPE_DIM < cache]
    if not fitting:
        smallest = RANKS[0] + ROPE_DIM
        raise InputError(
            f"{source.name} caches {cache} numbers per token and layer, and the least that vLLM has kernels for is {smallest} "
            f"({smallest / cache:.0%}): convert it without --for, or keep more"
        )
    return fitting[-1]
