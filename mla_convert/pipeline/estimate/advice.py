"""Advice of a dry run: at which share of the cache the loss becomes serious, from measured conversions. Imports no torch."""

from __future__ import annotations

from mla_convert.method.factorise.sizes import Plan

# Share of the original's bytes below which the loss of a bfloat16 latent is serious; above it, an 8-bit cache of the original is
# the alternative (benchmarks/results: quality-smollm2-135m, healing-quality, quality-quantised-cache-*).
SERIOUS = 0.45
FEW = 4  # KV heads; the models that were measured have 2 and 3


def advice(plan: Plan, healed: bool) -> list[str]:
    """Sentences for the user of a plan that saves something.

    Args:
        plan: sizes of the conversion.
        healed: whether healing follows.
    """
    if plan.cache_ratio >= 1 or plan.cache.quantised:
        return []
    shape, lines = plan.shape, []
    if plan.cache_ratio >= SERIOUS:
        lines.append(
            "compare the original with an FP8 or INT8 cache first: at about half of the bytes INT8 lost less on both models "
            "that were measured; a conversion also decodes faster, and its latent can be quantised again"
        )
    elif not healed:
        lines.append(
            "below half of the cache the loss becomes serious: perplexity ×1.18 at a third and ×1.32 at a quarter, healed ×1.10 "
            "and ×1.17 (SmolLM2-135M, 3 KV heads). Quantise the latent (--cache-dtype auto), which loses far less at equal bytes: "
            "×1.02 at a quarter, not healed (Qwen2.5-Coder-1.5B, 2 KV heads); or heal (--heal-tokens)"
        )
    if shape.num_kv_heads > FEW:
        lines.append(
            f"this model has {shape.num_kv_heads} KV heads; quality was measured on models with 2 and 3, whose keys are shared by "
            f"more query heads and have less to share: measure yours (sweep)"
        )
    return lines
