"""The sections of a report that come from a source and from the sizes of its conversion."""

from __future__ import annotations

import operator
from collections.abc import Mapping

from mla_convert.core.report_file import mean
from mla_convert.core.report_schema import CacheSection, Report, Sides, SourceSection
from mla_convert.core.units import human_bytes
from mla_convert.method.factorise.sizes import Plan
from mla_convert.report import format
from mla_convert.source.shape import AttentionShape

__all__ = ["CONTEXTS", "Report", "cache_section", "fixed_state_rows", "source_section"]

CONTEXTS = (4096, 32768, 131072)


def source_section(
    name: str, revision: str | None, model_type: str, shape: AttentionShape, licence: Mapping[str, object]
) -> SourceSection:
    """The source in a report: its name, the shape of its attention, and its licence.

    Args:
        name: of the source; no path.
        revision: commit on the Hub.
        model_type: of the source's configuration.
        shape: of its attention.
        licence: entries of the model card's metadata, `license` among them.
    """
    return SourceSection.model_validate(
        {
            "name": name,
            "revision": revision,
            "model_type": model_type,
            "layers": shape.layers,
            "attention_heads": shape.num_heads,
            "key_value_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            **licence,
        }
    )


def cache_section(plan: Plan, itemsize: int, windows: list[int | None], fixed_bytes: int = 0) -> CacheSection:
    """The KV cache in a report, before and after.

    Args:
        plan: the sizes of all converted layers.
        itemsize: bytes of a number of the model's dtype.
        windows: these layers' sliding windows in tokens (None: none). A layer caches at most as many tokens as its window.
        fixed_bytes: of the other layers' states.
    """
    widths = {"before": plan.shape.cache_widths, "after": [size.width for size in plan.layers]}
    rows = {side: [width * itemsize for width in each] for side, each in widths.items()}
    quantised = plan.cache.quantised
    if quantised:
        rows["after"] = [plan.cache.row_bytes(size) for size in plan.layers]

    def cached(context: int) -> Sides:
        tokens = [min(context, window) if window else context for window in windows]
        return Sides(**{side: sum(map(operator.mul, tokens, each)) for side, each in rows.items()})

    at_context = {str(context): cached(context) for context in CONTEXTS}
    hybrid = {}
    if fixed_bytes or plan.shape.converted is not None:
        shares = {
            context: Sides(
                before=size.before / (size.before + fixed_bytes), after=size.after / (size.after + fixed_bytes)
            )
            for context, size in at_context.items()
        }
        hybrid = {
            "layers": len(plan.shape.converted_layers),
            "fixed_bytes": fixed_bytes,
            "growing_share_at_context": shares,
        }
    return CacheSection(
        kv_lora_rank=mean(size.rank for size in plan.layers),
        qk_rope_head_dim=mean(size.rope_dim for size in plan.layers),
        numbers_per_token_per_layer=Sides(before=mean(widths["before"]), after=mean(widths["after"])),
        bytes_per_number=sum(rows["after"]) / sum(widths["after"]) if quantised else itemsize,
        bytes_per_token=cached(1),
        bytes_at_context=at_context,
        # Of a token in all layers: sliding windows, which bound both caches alike, do not count.
        share_saved=1 - sum(rows["after"]) / sum(rows["before"]),
        **({"latent_cache": plan.latent_cache} if quantised else {}),
        **hybrid,
    )


def fixed_state_rows(cache: CacheSection) -> list[tuple[str, str, str, str]]:
    """Of a hybrid model: the states that do not grow with the context, and the share of the whole cache that does."""
    if cache.fixed_bytes is None or not cache.growing_share_at_context:
        return []
    context, share = next(iter(cache.growing_share_at_context.items()))
    fixed = human_bytes(cache.fixed_bytes)
    return [
        ("states that do not grow, a sequence", fixed, fixed, ""),
        (f"share of the whole that grows, {format.context(context)}", f"{share.before:.1%}", f"{share.after:.1%}", ""),
    ]
