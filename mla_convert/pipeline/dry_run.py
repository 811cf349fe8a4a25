"""`plan`: sizes and needs of a conversion before and after, from the configuration alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from accelerate import init_empty_weights
from rich.console import Console
from transformers import AutoModelForCausalLM

from mla_convert.core.settings import ConvertConfig
from mla_convert.method.factorise.layer import mla_config
from mla_convert.method.factorise.sensitivity import TOKENS
from mla_convert.method.factorise.sizes import Plan
from mla_convert.method.refine.schedule import output_advances
from mla_convert.modeling.fixed_states import fixed_state_bytes
from mla_convert.pipeline.dry_run_sections import (
    CacheSection,
    CardFit,
    CardSection,
    HealSection,
    HostMemory,
    RunSection,
    Section,
    SourceSection,
    Warnings,
)
from mla_convert.pipeline.estimate import memory as sizing
from mla_convert.pipeline.estimate import time as timing
from mla_convert.pipeline.estimate.heal import HealEstimate, HealWork
from mla_convert.pipeline.estimate.heal import estimate as estimate_healing
from mla_convert.pipeline.resolve import ResolvedConversion, resolve
from mla_convert.report.report import cache_section
from mla_convert.source.shape import AttentionShape
from mla_convert.source.source import Source, open_source, parameters

LIMIT = 1 << 20  # longest context looked for where the model names none
# The device that each estimate is for. The conversion is resolved for both: its defaults differ.
PLACES = {"cpu": torch.device("cpu"), "h100": torch.device("cuda")}


@dataclass(frozen=True)
class DryRun:
    """Everything that `plan` reports; bytes and parameters are exact for unquantised weights."""

    source: SourceSection
    cache: CacheSection
    card: CardSection | None
    run: RunSection
    heal: HealSection | None
    warnings: Warnings

    @property
    def sections(self) -> list[Section]:
        """The sections that there are, in the order in which they are printed."""
        sections: list[Section | None] = [self.source, self.cache, self.card, self.run, self.heal, self.warnings]
        return [section for section in sections if section is not None]

    def as_dict(self) -> dict[str, Any]:
        """As `plan --json` prints it."""
        source, plan = self.source, self.cache.plan
        return {
            "source": {"name": source.name, "revision": source.revision, "model_type": source.model_type},
            "shape": source.shape,
            "dtype": source.dtype,
            "exact": plan.exact,
            "layers": [
                {"layer": layer, "kv_lora_rank": size.rank, "qk_rope_head_dim": size.rope_dim}
                for layer, size in zip(plan.shape.converted_layers, plan.layers, strict=True)
            ],
            "uniform": self.cache.uniform,
            "cache": {**self.cache.section, "grid": self.cache.grid},
            "parameters": self.cache.parameters,
            "disk_bytes": self.run.disk_bytes,
            "disk_aside_bytes": self.run.scratch_bytes,
            "peak_host_memory": asdict(self.run.memory),
            "time": {place: estimate.as_dict() for place, estimate in self.run.time.items()},
            "warnings": self.warnings.lines,
            **({"heal": self.heal.estimate.as_dict()} if self.heal else {}),
            **({"card": asdict(self.card)} if self.card else {}),
        }


def plan_conversion(config: ConvertConfig, card_bytes: int | None = None, card: str | None = None) -> DryRun:
    """Sizes before and after a conversion, and what it takes.

    Args:
        config: The conversion's settings.
        card_bytes: Memory of a card to fit model and cache into, in bytes.
        card: Name of that card.

    Raises:
        InputError: No such source, or sizes that it cannot have.
        ResourceError: The Hub cannot be reached.
    """
    source = open_source(config.source, config.revision, weights=False)
    resolved = {place: resolve(config, source, device) for place, device in PLACES.items()}
    on_cpu = resolved["cpu"]
    plan, dtype, windows = on_cpu.plan, on_cpu.dtype, source.sliding_windows
    before = {name: prod(source.reader.shape(name)) for name in source.reader.names()}
    after = _converted_parameters(source, plan, dtype)
    counts = {"before": _counts(source, before), "after": _counts(source, after)}
    weights = {side: count["model"] * dtype.itemsize for side, count in counts.items()}
    fixed = fixed_state_bytes(source.config, dtype)
    caches = {
        "before": sizing.CacheSize(plan.shape.cache_width, dtype.itemsize, tuple(windows), fixed),
        "after": sizing.CacheSize(plan.cache_width, dtype.itemsize, tuple(windows), fixed),
    }
    return DryRun(
        source=SourceSection(
            source.name,
            source.revision,
            source.config.model_type,
            shape_section(source),
            str(dtype).removeprefix("torch."),
        ),
        cache=CacheSection(
            plan=plan,
            uniform=on_cpu.uniform,
            section=cache_section(plan, dtype.itemsize, windows, fixed).as_dict(),
            sizes=caches,
            parameters={key: {side: count[key] for side, count in counts.items()} for key in ("attention", "model")},
        ),
        card=None if card_bytes is None else _card(source, card_bytes, card, weights, caches),
        run=RunSection(
            # beside the weights, each layer stores the indices of its rotary planes (int64)
            disk_bytes=weights["after"]
            + sum(size.rope_dim // 2 for size in plan.layers) * 8
            + (source.whole.other_bytes() if source.whole else 0),
            scratch_bytes=on_cpu.scratch_bytes,
            memory=_host_memory(on_cpu, after),
            time=_time(resolved, before, after),
        ),
        heal=HealSection(_healing(on_cpu, after), torch.get_num_threads()) if on_cpu.healing else None,
        warnings=Warnings([*source.notes, *sizing.warnings(plan)]),
    )


def _card(
    source: Source, card_bytes: int, card: str | None, weights: dict[str, int], caches: dict[str, sizing.CacheSize]
) -> CardSection:
    limit = getattr(source.config, "max_position_embeddings", None) or LIMIT
    usable = int(card_bytes * sizing.USABLE)
    sides = {
        side: CardFit(weights[side], **sizing.fit(usable - weights[side], cache, limit))
        for side, cache in caches.items()
    }
    return CardSection(card, card_bytes, usable, limit, sides["before"], sides["after"])


def shape_section(source: Source) -> dict[str, int]:
    """Shape of a source's attention, as JSON output names it."""
    shape = source.shape
    return {
        "layers": shape.layers,
        "attention_layers": len(shape.converted_layers),
        "hidden_size": shape.hidden_size,
        "attention_heads": shape.num_heads,
        "key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "key_value_bias": shape.has_kv_bias,
    }


def _converted_parameters(source: Source, plan: Plan, dtype: torch.dtype) -> dict[str, int]:
    """Elements of each parameter of the converted model."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(mla_config(source, plan, dtype), dtype=dtype)
    return {name: parameter.numel() for name, parameter in parameters(model).items()}


def _counts(source: Source, numbers: dict[str, int]) -> dict[str, int]:
    """Parameters of the attention layers and of the whole model."""
    return {
        "attention": sum(count for name, count in numbers.items() if source.is_replaced(name)),
        "model": sum(numbers.values()),
    }


def _prefixed(numbers: dict[str, int], prefix: str) -> int:
    """Elements of all parameters whose names begin with `prefix`."""
    return sum(count for name, count in numbers.items() if name.startswith(prefix))


def _share(shape: AttentionShape, numbers: float) -> float:
    """The mean over all layers of what only converted layers have or do."""
    return numbers if shape.converted is None else numbers * len(shape.converted) / shape.layers


def _mixing(plan: Plan) -> tuple[int, int]:
    """Query heads times the widths of a key and a value, before and after."""
    shape = plan.shape
    after = shape.num_heads * (plan.qk_nope_head_dim + plan.rope_dim + shape.head_dim)
    return shape.num_heads * 2 * shape.head_dim, after


def _time(
    resolved: dict[str, ResolvedConversion], before: dict[str, int], after: dict[str, int]
) -> dict[str, timing.TimeEstimate]:
    """Seconds on this machine's cores and on an H100, each with the settings of a conversion there."""
    source, plan = resolved["cpu"].source, resolved["cpu"].plan
    layer = source.first_layer
    attention = f"{layer}{source.family.attention}."
    shape, (mixing_before, mixing_after) = plan.shape, _mixing(plan)
    work = timing.LayerWork(
        hidden=shape.hidden_size,
        layer_before=_prefixed(before, layer),
        layer_after=_prefixed(after, layer),
        attention_before=_share(shape, _prefixed(before, attention)),
        attention_after=_share(shape, _prefixed(after, attention)),
        mixing_before=_share(shape, mixing_before),
        mixing_after=_share(shape, mixing_after),
        head=shape.hidden_size * source.config.vocab_size,
    )
    runs = {}
    for place, conversion in resolved.items():
        refine = conversion.refinement
        last = output_advances(refine, shape) / shape.layers  # extra steps of the last layers, spread over all
        runs[place] = timing.LayerRun(
            calib=conversion.calibration,
            evaluation=conversion.evaluation,
            steps=refine.steps,
            batch=refine.batch,
            measured=TOKENS[conversion.device.type] * conversion.is_measured,
            block_steps=refine.block_steps + last,
            output_steps=refine.output_steps / shape.layers,
        )
    return timing.estimate(work, shape.layers, runs, torch.get_num_threads())


def _healing(resolved: ResolvedConversion, after: dict[str, int]) -> HealEstimate:
    """Memory and time of the healing run."""
    source, plan, healing = resolved.source, resolved.plan, resolved.healing
    assert healing is not None
    shape, config = plan.shape, source.config
    limit = getattr(config, "max_position_embeddings", None)
    experts = getattr(config, "num_experts_per_tok", None) or 1
    inner = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
    mixing_before, mixing_after = _mixing(plan)
    work = HealWork(
        weights=sum(after.values()),
        attention=_counts(source, after)["attention"],
        looked_up=0 if getattr(config, "tie_word_embeddings", False) else shape.hidden_size * config.vocab_size,
        layers=shape.layers,
        hidden=shape.hidden_size,
        intermediate=experts * (inner or 4 * shape.hidden_size),
        mixing_before=mixing_before,
        mixing_after=mixing_after,
    )
    length = max(each for each, _ in healing.mix(limit))
    written = healing.written_tokens(limit)
    return estimate_healing(work, healing.tokens, healing.train, length, torch.get_num_threads(), written)


def _host_memory(resolved: ResolvedConversion, after: dict[str, int]) -> HostMemory:
    """Peak host memory of a conversion on a CPU, and the moment of the peak."""
    source = resolved.source
    layers, first = f"{source.family.layers}.", source.first_layer
    moments = sizing.peak_host_bytes(
        table=max(count for name, count in after.items() if not name.startswith(layers)),
        layer=_prefixed(after, first),
        attention=_prefixed(after, f"{first}{source.family.attention}."),
        hidden=resolved.plan.shape.hidden_size,
        itemsize=resolved.dtype.itemsize,
        calibration_tokens=prod(resolved.calibration),
        evaluation_tokens=prod(resolved.evaluation),
    )
    if source.gguf:  # transformers holds these whole, in float32
        moments = {moment: size + 4 * sum(after.values()) for moment, size in moments.items()}
    largest = max(moments, key=moments.__getitem__)
    whole = "; on top of it comes the whole model in float32, as GGUF is read" if source.gguf else ""
    return HostMemory(moments[largest], largest, sizing.HOST_BASIS + whole)


def print_plan(plan: DryRun, console: Console) -> None:
    """Print the sections of a dry run, one after another."""
    for section in plan.sections:
        for part in section.rows():
            if isinstance(part, str):
                console.print(part, highlight=False, soft_wrap=True, markup=False)
            else:
                console.print(part)
