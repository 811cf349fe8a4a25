"""Settings of a conversion that aims at a serving engine: sizes that it has kernels for, planes that it can express."""

from __future__ import annotations

from pathlib import Path

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.settings import ConvertConfig
from mla_convert.method.factorise.sizes import Plan, shares_out
from mla_convert.publish.engines.padding import KNOWN, RANKS, ROPE_DIM, padded
from mla_convert.publish.engines.profiles import Profile, check_dtype, check_family, check_profile_of, needs_code
from mla_convert.source.source import Source

# Largest fraction of the cache that is kept where no size is given.
KEPT = 0.6


def apply_constraints(config: ConvertConfig, source: Source) -> ConvertConfig:
    """The settings with sizes and planes that `config.engine` can serve; unchanged without an engine.

    Sizes are uniform. Planes come from one table for all layers where the source can be exported without code. They are free
    where profile hf-code is needed anyway (biases, a RoPE scaling), because it stores a table for each layer. Applying the
    constraints a second time changes nothing.

    Args:
        config: The settings as given.
        source: The model to convert.

    Raises:
        UsageError: A setting that the engine has no kernel for.
        InputError: A source that the engine cannot serve, or has no size for.
    """
    if config.engine is None:
        return config
    engine, shape = config.engine, source.shape
    if config.cache_dtype != "bf16":
        raise UsageError(
            f"--cache-dtype {config.cache_dtype} is not for --for {engine}, which quantises its cache by an option of its own: "
            f"leave it out"
        )
    check_family(source.config, source.family.model_type, source.name)
    reason = _reason(source)
    if reason and engine != "vllm":
        raise InputError(
            f"{source.name} has {reason}, and {engine} runs no code of a model's: serve it with vLLM or transformers"
        )
    default = "by_loss" if reason else "engine_table"
    selection = config.rope_selection if "rope_selection" in config.model_fields_set else default
    if selection == "evenly_spaced" or (selection == "by_loss" and engine != "vllm"):
        raise UsageError(
            f"--rope-selection {selection} is nothing that {engine} can express: give engine_table, or leave it out"
        )
    widest = shape.head_dim if selection == "engine_table" else shape.full_rope_dim
    rope_dim = min(ROPE_DIM, widest) if config.rope_dim is None else config.rope_dim
    if rope_dim == "full" or rope_dim > ROPE_DIM:
        raise UsageError(f"--rope-dim {rope_dim} is not possible with --for {engine}: give at most {ROPE_DIM}")
    sizes = {"rank": _rank(config, source, rope_dim), "rope_dim": rope_dim, "kv_ratio": None}
    return config.model_copy(update={"uniform": True, "rope_selection": selection, **sizes})


def with_export_defaults(config: ConvertConfig, profile: Profile) -> ConvertConfig:
    """The settings with the sizes and planes that a profile needs, where neither they nor an engine are given.

    Args:
        config: The settings as given.
        profile: Profile of the export.
    """
    needed = {"uniform": True, **({} if profile == "hf-code" else {"rope_selection": "engine_table"})}
    free = {} if config.engine else {key: value for key, value in needed.items() if key not in config.model_fields_set}
    return config.model_copy(update=free)


def check_export(settings: ConvertConfig, plan: Plan, profile: Profile, source: Source) -> None:
    """Refuse, before a conversion, an export of its result that is not possible whatever the result is.

    Args:
        settings: Settings of the conversion, after `apply_constraints`.
        plan: Sizes that follow from them.
        profile: Profile of the export.
        source: The model to convert.

    Raises:
        UsageError: Settings that the profile cannot express.
        InputError: A source that the profile cannot express.
    """
    check_family(source.config, source.family.model_type, source.name)
    check_profile_of(profile, _reason(source), source.name)
    if shares_out(settings, plan):
        raise UsageError("--export needs one size for all layers: add --for ENGINE, or --uniform")
    if profile != "hf-code" and settings.rope_selection == "by_loss" and plan.rope_dim:
        raise UsageError(
            f"--export {profile} needs planes of one table: add --for ENGINE, or --rope-selection engine_table"
        )
    padded([plan.rank], plan.rope_dim, plan.qk_nope_head_dim, source.shape.head_dim, "auto")
    stored = str(source.dtype).removeprefix("torch.")
    check_dtype(stored if settings.dtype == "auto" else settings.dtype, "auto")


def default_export(folder: Path, profile: str) -> Path:
    """Folder of an export for which none is named: beside the converted folder, named after it and the profile."""
    return folder.resolve().parent / f"{folder.resolve().name}-{profile}"


def _reason(source: Source) -> str | None:
    """Why the source needs profile hf-code, or None."""
    return needs_code(source.config, any(source.has_bias(letter) for letter in "qkvo"), source.shape.normed)


def _rank(config: ConvertConfig, source: Source, rope_dim: int) -> int:
    """The rank given, if the engine has kernels for it, or the largest within the fraction of the cache to keep."""
    engine, cache = config.engine, source.shape.cache_width
    if config.rank is not None:
        if config.rank == "full" or (engine == "vllm" and config.rank not in RANKS) or config.rank > RANKS[-1]:
            which = KNOWN if engine == "vllm" else f"at most {RANKS[-1]}"
            raise UsageError(
                f"--rank {config.rank} is not possible with --for {engine}: give {which.replace(' and ', ' or ')}"
            )
        return config.rank
    kept = KEPT if config.kv_ratio is None else config.kv_ratio
    if engine != "vllm":
        return max(16, min(RANKS[-1], int(kept * cache - rope_dim) // 16 * 16))
    largest = source.shape.full_rank(rope_dim)
    fitting = [rank for rank in RANKS if rank <= largest and rank + ROPE_DIM <= kept * cache]
    if not fitting and config.kv_ratio is None:
        # Where no fraction was asked for, the smallest rank will do if it saves anything.
        fitting = [rank for rank in RANKS[:1] if rank <= largest and rank + ROPE_DIM < cache]
    if not fitting:
        smallest = RANKS[0] + ROPE_DIM
        raise InputError(
            f"{source.name} caches {cache} numbers per token and layer, and the least that vLLM has kernels for is {smallest} "
            f"({smallest / cache:.0%}): convert it without --for, or keep more"
        )
    return fitting[-1]
