"""The work of a conversion in numbers, from the configuration alone: for the estimates of a plan and of a budget."""

from __future__ import annotations

from math import prod

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from mla_convert.method.factorise.layer import mla_config
from mla_convert.method.factorise.sensitivity import TOKENS
from mla_convert.method.factorise.sizes import Plan
from mla_convert.method.refine.schedule import output_advances
from mla_convert.pipeline.estimate import time as timing
from mla_convert.pipeline.resolve import ResolvedConversion
from mla_convert.source.shape import AttentionShape
from mla_convert.source.source import Source, parameters


def source_parameters(source: Source) -> dict[str, int]:
    """Elements of each parameter of the source."""
    return {name: prod(source.reader.shape(name)) for name in source.reader.names()}


def converted_parameters(source: Source, plan: Plan, dtype: torch.dtype) -> dict[str, int]:
    """Elements of each parameter of the converted model."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(mla_config(source, plan, dtype), dtype=dtype)
    return {name: parameter.numel() for name, parameter in parameters(model).items()}


def prefixed(numbers: dict[str, int], prefix: str) -> int:
    """Elements of all parameters whose names begin with `prefix`."""
    return sum(count for name, count in numbers.items() if name.startswith(prefix))


def mixing(plan: Plan) -> tuple[int, int]:
    """Query heads times the widths of a key and a value, before and after; the mean where heads differ by layer."""
    shape, layers = plan.shape, plan.shape.converted_layers
    if shape.heads:
        both = [mixing(plan.of(layer)) for layer in layers]
        return sum(before for before, _ in both) // len(layers), sum(after for _, after in both) // len(layers)
    after = shape.num_heads * (plan.qk_nope_head_dim + plan.rope_dim + shape.head_dim)
    return shape.num_heads * 2 * shape.head_dim, after


def _share(shape: AttentionShape, numbers: float) -> float:
    """The mean over all layers of what only converted layers have or do."""
    return numbers if shape.converted is None else numbers * len(shape.converted) / shape.layers


def layer_work(resolved: ResolvedConversion, before: dict[str, int], after: dict[str, int]) -> timing.LayerWork:
    """Sizes that the work on one layer depends on.

    Args:
        resolved: The conversion.
        before: Elements of each parameter of the source.
        after: The same of the converted model.
    """
    source, plan = resolved.source, resolved.plan
    layer = source.first_layer
    attention = f"{layer}{source.family.attention}."
    shape, (mixing_before, mixing_after) = plan.shape, mixing(plan)
    return timing.LayerWork(
        hidden=shape.hidden_size,
        layer_before=prefixed(before, layer),
        layer_after=prefixed(after, layer),
        attention_before=_share(shape, prefixed(before, attention)),
        attention_after=_share(shape, prefixed(after, attention)),
        mixing_before=_share(shape, mixing_before),
        mixing_after=_share(shape, mixing_after),
        head=shape.hidden_size * source.config.vocab_size,
    )


def layer_run(conversion: ResolvedConversion) -> timing.LayerRun:
    """Settings that the time of a conversion depends on."""
    refine, shape = conversion.refinement, conversion.plan.shape
    layers = shape.layers
    last = output_advances(refine, shape) / layers  # extra steps of the last layers, spread over all
    return timing.LayerRun(
        calib=conversion.calibration,
        evaluation=conversion.evaluation,
        steps=refine.steps,
        batch=refine.batch,
        measured=TOKENS[conversion.device.type] * conversion.is_measured,
        block_steps=refine.block_steps + last,
        output_steps=refine.output_steps / layers,
        originals=len(conversion.settings.original_cache or ()),
    )
